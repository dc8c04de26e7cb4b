"""Parallelism: devices, mesh, and what runs on each device.

Read `mesh` first (named axes, processes, rules from logical axes to mesh axes); then `pipeline` and
`sharded_lookup`, which the rules alone do not express, `gradient_accumulation` (a batch in parts)
and `hosts` (joining the processes of a run). Models use `mesh.constrain`,
`sharded_lookup.embedding_lookup` and `pipeline.scan_as_pipeline`; sublayers that communicate are
theirs (`lm/models/sharded_attention.py`, `sharded_experts.py`). `mesh_rules` validates a
configuration on several devices, `agreement` compares the processes before the first step.
"""
