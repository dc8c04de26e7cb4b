"""Processes started and kept alive: `lm launch` (one run) and `lm sweep` (many runs).

Read `processes` (a group of child processes), `supervise` (`lm launch`: restarts), then the sweep:
`launchers` (this machine, SLURM, TPU slices), `run_status`, `scheduler` (starts, retries,
successive halving), `sweep_table`, `run_sweep`, which joins them, and `trials` (adaptive search).
The verbs call `supervise.launch`, `run_sweep.run_sweep` and `trials.run_search`. The types that
sweep files import are in `lm.sweeps`.
"""
