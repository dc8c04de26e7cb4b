"""Scores by metric name, and what metrics share.

A metric is a function of predictions and references of a whole split, one each an example in the
same order, to named scores. Scores are in percent, as papers print them; correlations (matthews,
pearson, spearman) are in [-1, 1]. A reference may be a list of several: the best counts.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from lm.config.registries import METRICS
from lm.errors import UserError, missing_package


def score_predictions(
    names: Sequence[str], predictions: Sequence, references: Sequence
) -> dict[str, float | str]:
    """Return the scores of all named metrics in one dict.

    Raises:
        UserError: unknown metric, no examples, or not as many predictions as references.
    """
    if len(predictions) != len(references):
        raise UserError(
            f"{len(predictions)} predictions for {len(references)} references: "
            "both must be of the same examples in the same order"
        )
    if not len(references):
        raise UserError("nothing to score: there are no predictions and no references")
    scores: dict[str, float | str] = {}
    for name in names:
        scores |= METRICS[name](predictions, references)
    return scores


def alternatives(reference: Any) -> Sequence[Any]:
    """Return the right answers of an example: those of a list or tuple, else the one."""
    return reference if isinstance(reference, list | tuple) else (reference,)


def single(references: Sequence) -> Sequence:
    """Return the references of a metric that takes one each; UserError if one is a list."""
    for number, reference in enumerate(references, start=1):
        if isinstance(reference, list | tuple):
            raise UserError(f"example {number} has several references, this metric takes one")
    return references


def import_optional(module: str) -> Any:
    """Import a module of the optional libraries; UserError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-").replace("sklearn", "scikit-learn")
        raise missing_package("this metric", package, "eval") from error
