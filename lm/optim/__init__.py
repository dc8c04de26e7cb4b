"""Optimizers and learning-rate schedules.

Read `optimizers` (AdamW, Muon, schedules), then `further_optimizers` (others, layer-wise decay).
Public: `optimizers.make_optimizer`, `optimizers.make_schedule`.
"""
