"""Scores of answers in percent: exact match, and SQuAD's exact match and F1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from lm.evaluation.metrics.metric_inputs import alternatives

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(predictions: Sequence[str], references: Sequence) -> dict[str, float]:
    """How many predictions equal one of their references, runs of white space counted as one."""
    pairs = zip(predictions, references, strict=True)
    right = sum(
        prediction.split() in [text.split() for text in alternatives(reference)]
        for prediction, reference in pairs
    )
    return {"exact_match": 100 * right / len(predictions)}


def squad(predictions: Sequence[str], references: Sequence) -> dict[str, float]:
    """SQuAD's exact match and F1, each the best over the example's answers.

    As the official script of version 2: a question without answers (an empty list) has the
    answer "". Words are divided at spaces, so F1 of Chinese is close to exact match.
    """
    exact = f1 = 0.0
    for prediction, reference in zip(predictions, references, strict=True):
        words = _words(prediction)
        answers = [answer for answer in map(_words, alternatives(reference)) if answer] or [[]]
        exact += words in answers
        f1 += max(_f1(words, answer) for answer in answers)
    return {
        "squad_exact_match": 100 * exact / len(predictions),
        "squad_f1": 100 * f1 / len(predictions),
    }


def _words(answer: str) -> list[str]:
    """The words that count: lower-cased, without ASCII punctuation and without articles."""
    text = answer.lower().translate(_WITHOUT_PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _f1(prediction: list[str], answer: list[str]) -> float:
    if not prediction or not answer:
        return float(prediction == answer)
    common = (Counter(prediction) & Counter(answer)).total()
    return 2 * common / (len(prediction) + len(answer))
