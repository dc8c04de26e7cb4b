"""Accounting: parameter counts, bytes and FLOPs of a model, from shapes and roles alone.

Read `flops.py` (the convention), then `parameter_counts.py` (counts as in papers, `lm params`).
"""
