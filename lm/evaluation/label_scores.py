"""Scores of labels in percent (scikit-learn) and of numbers in [-1, 1] (SciPy)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats

from lm.errors import UserError
from lm.evaluation.scores import alternatives, import_optional, single


def accuracy(predictions: Sequence, references: Sequence) -> dict[str, float]:
    """Return the share of right labels."""
    pairs = zip(predictions, references, strict=True)
    right = sum(prediction in alternatives(reference) for prediction, reference in pairs)
    return {"accuracy": 100 * right / len(predictions)}


def f1(predictions: Sequence, references: Sequence) -> dict[str, float]:
    """Return F1 of the positive class: the second of the two labels in sorted order."""
    labels = sorted(set(single(references)))
    if len(labels) != 2:
        advice = "" if len(labels) == 1 else ": use macro_f1"
        raise UserError(f"f1 is for two labels, the references hold {len(labels)}{advice}")
    return {"f1": _f1(predictions, references, labels[1:])}


def macro_f1(predictions: Sequence, references: Sequence) -> dict[str, float]:
    """Return the mean F1 over the labels that occur in predictions or references."""
    return {"macro_f1": _f1(predictions, references, None)}


def _f1(predictions: Sequence, references: Sequence, labels: list | None) -> float:
    f1_score = import_optional("sklearn.metrics").f1_score
    gold = single(references)
    score = f1_score(gold, predictions, labels=labels, average="macro", zero_division=0.0)
    return 100 * float(score)


def matthews(predictions: Sequence, references: Sequence) -> dict[str, float]:
    """Return the Matthews correlation of two or more labels; 0 if only one was predicted."""
    metrics = import_optional("sklearn.metrics")
    return {"matthews": float(metrics.matthews_corrcoef(single(references), predictions))}


def pearson(predictions: Sequence, references: Sequence) -> dict[str, float]:
    """Return Pearson's correlation of numbers; nan where one side is constant."""
    return {"pearson": _correlation(stats.pearsonr, predictions, references)}


def spearman(predictions: Sequence, references: Sequence) -> dict[str, float]:
    """Return Spearman's rank correlation, ties at their mean rank; nan where undefined."""
    return {"spearman": _correlation(stats.spearmanr, predictions, references)}


def _correlation(
    function: Callable[[np.ndarray, np.ndarray], Any], predictions: Sequence, references: Sequence
) -> float:
    try:
        x, y = (np.asarray(side, np.float64) for side in (predictions, single(references)))
    except ValueError as error:
        raise UserError(f"a correlation is of numbers: {error}") from error
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(function(x, y).statistic)
