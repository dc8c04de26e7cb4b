"""Parallelism: devices, mesh, and what runs on each device.

Read `mesh` first (named axes, processes, rules from logical axes to mesh axes); then `pipeline` and
`sharded_lookup`, which rules cannot express, `gradient_accumulation` (microbatches) and `hosts`
(multi-process startup). Models use `mesh.constrain`, `sharded_lookup.embedding_lookup` and
`pipeline.scan_as_pipeline`; sublayers with collectives are in `lm/models/sharded_attention.py` and
`sharded_experts.py`. `mesh_rules` validates a configuration on several devices; `agreement`
compares the processes before the first step.
"""
