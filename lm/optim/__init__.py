"""Optimizers, schedules, LoRA, and the groups of parameters that they treat differently.

Read `optimizers`, then `parameter_groups`. Public: `optimizers.make_optimizer`,
`schedules.make_schedule`, `lora.add_lora`, `lora.merge_lora`.
"""
