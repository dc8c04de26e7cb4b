"""Parallelism: devices, mesh, and what runs on each device.

Read `mesh` first (named axes, processes, rules from logical axes to mesh axes); then `pipeline`,
`experts` and `sharded_lookup`, which the rules alone do not express, and `hosts` (joining the
processes of a run). Models use `mesh.constrain`, `sharded_lookup.embedding_lookup`,
`pipeline.scan_as_pipeline` and `experts.mixture_of_experts`. `mesh_rules` validates a configuration
on several devices, `xla_flags` has the compiler's options, `agreement` compares the processes
before the first step.
"""
