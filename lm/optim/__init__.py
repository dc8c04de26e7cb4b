"""Optimizers, schedules, LoRA, and the groups of parameters that they treat differently.

Read `optimizers` (AdamW, Muon, schedules), then `further_optimizers` and `parameter_groups`
(freezing, layer-wise decay); `gradient_accumulation` is beside them. Public:
`optimizers.make_optimizer`, `optimizers.make_schedule`, `lora.add_lora`, `lora.merge_lora`.
"""
