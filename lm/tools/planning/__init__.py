"""`lm plan`: compile the training step for a described machine, and report its requirements.

Read `topologies` (described devices), `program` (the compiled step), `hlo` (parsed HLO), `work`
(FLOPs and memory traffic), `collectives` (communication), `plan`, which combines them, and
`plan_report` (text output); then `cost_model` and `mesh_search` (`lm plan --search`). Public:
`topologies.topology`, `plan.make_plan` and `mesh_search.search_meshes`.
"""
