"""From scores of starts and ends to the texts that answer the questions (Devlin 2018, §4.2-4.3).

Shape letters: N windows, L length, W longest answer.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from lm.objectives.span_qa import SpanQa, Windows

MAX_TOKENS = 30  # of an answer, as in BERT


class Span(NamedTuple):
    """Columns of an answer's first and last token; -inf where a window has no context."""

    score: float
    start: int
    end: int


def best_span(scores_L2: np.ndarray) -> Span:
    """The span of at most `MAX_TOKENS` with the largest sum of start and end, [cls] aside."""
    starts_L, ends_L = scores_L2[1:].T
    padded = np.pad(ends_L, (0, MAX_TOKENS - 1), constant_values=-np.inf)
    ends_LW = np.lib.stride_tricks.sliding_window_view(padded, MAX_TOKENS)
    sums_LW = starts_L[:, None] + ends_LW
    start, extent = np.unravel_index(sums_LW.argmax(), sums_LW.shape)
    return Span(float(sums_LW[start, extent]), int(start) + 1, int(start + extent) + 1)


def span_answers(
    objective: SpanQa, windows: Windows, scores_NL2: np.ndarray, may_lack: bool
) -> list[str]:
    """The answer to the question of each record, by the best span over all of its windows.

    scores_NL2: what the objective's `predict` says of each window. may_lack: a question may have
    no answer, which is "": it has none if [cls] has more in every window.
    """
    spans = [best_span(scores_L2) for scores_L2 in scores_NL2]
    nothing_N = scores_NL2[:, 0].sum(-1)
    answers = []
    for first, stop in pairwise(windows.offsets):
        best = max(range(first, stop), key=lambda number: spans[number].score)
        threshold = nothing_N[first:stop].min() if may_lack else -np.inf
        found = spans[best].score >= threshold and spans[best].score > -np.inf
        answers.append(_text(objective, windows, best, spans[best]) if found else "")
    return answers


def _text(objective: SpanQa, windows: Windows, number: int, span: Span) -> str:
    """What the context says between two columns of a window."""
    example = windows[number]
    record, shift = example["record"], objective.shift(example)
    return record.raw["context"][record.starts[span.start - shift] : record.ends[span.end - shift]]
