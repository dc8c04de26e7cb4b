"""`lm plan`: the training step compiled for a described machine, and what it needs there.

Read `topologies` (described devices), `program` (the compiled step), `hlo` (its text as data),
`work` (FLOPs and memory traffic), `collectives` (communication), `plan`, which joins them, and
`plan_report` (the text); then `cost_model` and `mesh_search` (`lm plan --search`). Public are
`topologies.topology`, `plan.make_plan` and `mesh_search.search_meshes`.
"""
