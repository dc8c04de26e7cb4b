"""What sweep files import: `sweep` (Sweep, Halving, Search) and `sets` (sets of overrides)."""
