"""Optimizers, schedules, and the groups of parameters that they treat differently.

Read `optimizers` (AdamW, Muon, schedules), then `further_optimizers` and `parameter_groups`
(freezing, layer-wise decay). Public: `optimizers.make_optimizer`, `optimizers.make_schedule`.
"""
