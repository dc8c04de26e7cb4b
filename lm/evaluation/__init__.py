"""Evaluation: loss and perplexity of a split, scores of a task, scores of word vectors.

Read `loss.py` (`lm eval`), then `task.py` (`lm eval --task`) with `scores.py`, which has the
metrics. Public: `evaluate_loss`,
`evaluate_task`, `score_predictions`.
"""
