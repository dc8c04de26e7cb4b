"""Types for sweep files: `sweep` (Sweep, Halving, Search) and `sets` (sets of overrides)."""
