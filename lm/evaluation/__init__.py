"""Evaluation: loss and perplexity of a split, scores of a task or of word vectors, safety sets.

Read `loss.py` (`lm eval`), then `task.py` (`lm eval --task`) with `scores.py`, which has the
metrics; `safety/` (`lm eval --safety`). Public: `evaluate_loss`,
`evaluate_task`, `score_predictions`.
"""
