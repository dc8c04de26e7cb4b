"""Objectives: from the examples of a store to features, a loss and, for tasks, answers.

Read `objective.py`, the interface, then `causal.py`, the shortest one, and `losses.py`, which
they share, with `chunked_losses.py` and `layer_losses.py` for some configurations. One file an
objective; `lm/data/special_tokens.py` has the ids that several put into rows.
Public: `Objective` to write one's own, registered as a plug-in.
"""
