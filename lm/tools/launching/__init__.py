"""Processes started and kept alive: `lm launch` (one run) and `lm sweep` (many runs).

Read `processes` (a group of child processes), `supervise` (`lm launch`: restarts), then the sweep:
`launchers` (this machine, SLURM, TPU slices), `scheduler` (status of runs, starts, retries,
successive halving) and `run_sweep` (table, results, adaptive search). The verbs call
`supervise.launch`, `run_sweep.run_sweep` and `run_sweep.run_search`. The types that sweep files
import are in `lm.sweeps`.
"""
