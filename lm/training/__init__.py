"""Training of a run: the loop, warm starts, metrics, and the monitoring of the process.

Read `trainer` (from a configuration to a finished run), then `monitor`. Public: `trainer.train`.
"""
