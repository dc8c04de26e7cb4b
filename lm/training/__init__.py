"""Training: the loop, warm starts, metrics and process monitoring.

Read `trainer` (from a configuration to a finished run), then `monitor`. Public: `trainer.train`.
"""
