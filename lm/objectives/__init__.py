"""Objectives: from examples of a store to features, a loss and, for tasks, answers.

Read `objective.py` (the interface), then `causal.py` (the shortest one) and `losses.py`, which they
share, with `chunked_losses.py` and `layer_losses.py` for some configurations. There is one file per
objective; `lm/data/special_tokens.py` has the ids that several of them insert into rows.
Public: `Objective`, to write one's own and register it as a plug-in.
"""
