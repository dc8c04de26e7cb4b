"""Metrics by name: (predictions, references) of a whole split to named scores.

A score is in percent, as papers print it; correlations (matthews, pearson, spearman) are in
[-1, 1]. A reference may be a list of several: the best counts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

from lm.config import nearest
from lm.errors import UserError
from lm.evaluation.metrics.answer_scores import exact_match, squad
from lm.evaluation.metrics.generation_scores import bleu, bleu_tok, chrf, rouge, rouge_stemmed
from lm.evaluation.metrics.label_scores import accuracy, f1, macro_f1, matthews, pearson, spearman

Metric = Callable[[Sequence, Sequence], Mapping[str, float | str]]


def _checked(metric: Metric) -> Metric:
    @functools.wraps(metric)
    def checked(predictions: Sequence, references: Sequence) -> Mapping[str, float | str]:
        if len(predictions) != len(references):
            raise UserError(
                f"{len(predictions)} predictions for {len(references)} references: "
                "both must be of the same examples in the same order"
            )
        if not len(references):
            raise UserError("nothing to score: there are no predictions and no references")
        return metric(predictions, references)

    return checked


_ALL: tuple[Metric, ...] = (
    *(bleu, bleu_tok, chrf, rouge, rouge_stemmed),
    *(accuracy, f1, macro_f1, matthews, pearson, spearman),
    *(exact_match, squad),
)
METRICS: dict[str, Metric] = {metric.__name__: _checked(metric) for metric in _ALL}


def check_metrics(names: Iterable[str]) -> None:
    """Raise UserError for the first name that is no metric."""
    for name in names:
        if name not in METRICS:
            raise UserError(f"unknown metric {name!r}{nearest(name, METRICS)}")


def measure(
    names: Sequence[str], predictions: Sequence, references: Sequence
) -> dict[str, float | str]:
    """The scores of all the named metrics in one dict; UserError for a name that is none."""
    check_metrics(names)
    scores: dict[str, float | str] = {}
    for name in names:
        scores |= METRICS[name](predictions, references)
    return scores
