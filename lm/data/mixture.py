"""Mixtures with scheduled weights, by random access: curricula and annealing.

Part k has had C_k(t) = ∫₀ᵗ p_k of its examples by row t, for weights p that are linear between the
knots of a schedule and sum to 1. Its example j comes at the time C_k(t) = j + 1/2, and the rows are
the examples of all parts in the order of their times. So no part is ever more than half an example
from its share at that time, and row n is found without the rows before it.

Shape letters: S knots, P parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import grain
import numpy as np
from ml_collections import ConfigDict

from lm.config.mixture_rules import Knot, parse_schedule
from lm.config.ramps import rows_before
from lm.config.registry import listed
from lm.data.batches import Examples, shuffle_endlessly
from lm.data.dataset import Dataset

_BLOCK = 4096  # rows whose order is computed together


@dataclass(frozen=True)
class Schedule:
    """Order of the examples of several parts, by a schedule of weights.

    Attributes:
        knots: weights at ascending rows; constant before the first and after the last.
    """

    knots: tuple[Knot, ...]

    @cached_property
    def _pieces(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows [S] where the pieces start, shares [S, P] there, and slopes [S, P] within them."""
        rows = np.array([0, *(knot.at for knot in self.knots)], np.float64)
        weights = np.array([self.knots[0].weights, *(knot.weights for knot in self.knots)])
        shares = weights / weights.sum(1, keepdims=True)
        lengths = np.diff(rows)
        kept = np.append(lengths > 0, True)  # at a step change, keep only what follows it
        slopes = np.zeros_like(shares)
        rising = lengths > 0
        slopes[:-1][rising] = (np.diff(shares, axis=0)[rising].T / lengths[rising]).T
        return rows[kept], shares[kept], slopes[kept]

    @cached_property
    def _at_pieces(self) -> np.ndarray:
        """Number of examples [S, P] of each part before each piece."""
        rows, shares, slopes = self._pieces
        length = np.diff(rows)[:, None]
        made = length * (shares[:-1] + 0.5 * slopes[:-1] * length)
        return np.concatenate([np.zeros_like(shares[:1]), made.cumsum(0)])

    def examples_before(self, row: float) -> np.ndarray:
        """Return the expected number of examples [P] of each part before a row."""
        rows, shares, slopes = self._pieces
        piece = max(int(np.searchsorted(rows, row, side="right")) - 1, 0)
        after = row - rows[piece]
        return self._at_pieces[piece] + after * (shares[piece] + 0.5 * slopes[piece] * after)

    def _times(self, part: int, examples: np.ndarray) -> np.ndarray:
        """Return the times of some examples of a part, at which C(t) equals their index + 1/2."""
        rows, shares, slopes = self._pieces
        wanted = examples + 0.5
        piece = np.searchsorted(self._at_pieces[:, part], wanted, side="left") - 1
        piece = np.maximum(piece, 0)
        missing = wanted - self._at_pieces[piece, part]
        share, slope = shares[piece, part], slopes[piece, part]
        # Root of slope/2 x² + share x = missing, in a form that also holds for slope 0.
        root = np.sqrt(np.maximum(share * share + 2 * slope * missing, 0))
        return rows[piece] + 2 * missing / (share + root)

    @lru_cache(maxsize=8)  # noqa: B019  as long as the order is in use
    def _block(self, block: int) -> np.ndarray:
        """Return part and index in the part, [_BLOCK, 2], for the rows of a block."""
        n_parts = len(self.knots[0].weights)
        start, end = block * _BLOCK, (block + 1) * _BLOCK
        first = np.floor(self.examples_before(max(start - n_parts, 0)) + 0.5).astype(np.int64)
        last = np.floor(self.examples_before(end + n_parts) + 0.5).astype(np.int64)
        parts = np.repeat(np.arange(n_parts), last - first)
        found = [np.arange(a, b) for a, b in zip(first, last, strict=True)]
        times = np.concatenate([self._times(part, found[part]) for part in range(n_parts)])
        order = np.lexsort((parts, times))[start - first.sum() :][:_BLOCK]
        return np.stack([parts, np.concatenate(found)], axis=1)[order]

    def locate(self, row: int) -> tuple[int, int]:
        """Return the part of a row, and the index of its example in that part."""
        part, index = self._block(row // _BLOCK)[row % _BLOCK]
        return int(part), int(index)

    def epochs(self, row: int, sizes: Sequence[int]) -> list[float]:
        """Return the number of passes over each part before a row, given the part sizes."""
        return (self.examples_before(row) / np.asarray(sizes)).tolist()


class ScheduledMix(grain.MapDataset):
    """Endless mixture of endless streams, ordered by a schedule."""

    def __init__(self, streams: Sequence[grain.MapDataset], schedule: Schedule):
        super().__init__(streams)
        self._schedule = schedule

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        part, of_part = self._schedule.locate(index)
        return self._parents[part][of_part]


def shuffle_and_mix(
    parts: Sequence[Examples], dataset: Dataset, config: ConfigDict, first_row: int = 0
) -> grain.MapDataset:
    """Mix endless examples of several parts, each reshuffled every epoch.

    Args:
        parts: examples of each training store.
        dataset: the stores. Grain follows their weights to about 1 %; scheduled weights, and passes
            over each store, are exact to a row.
        config: configuration.
        first_row: index of the first row of step 0 in the order.

    Raises:
        UserError: a part is too long to shuffle.
    """
    streams = [shuffle_endlessly(part, config.seed, index) for index, part in enumerate(parts)]
    if config.data.schedule or config.data.epochs:
        return ScheduledMix(streams, _schedule(parts, dataset, config.data, first_row))
    return grain.MapDataset.mix(streams, [float(share) for share in _shares(dataset)])


def _shares(dataset: Dataset) -> Sequence[float]:
    return dataset.weights or [store.n_tokens for store in dataset.train]


def _schedule(
    parts: Sequence[Examples], dataset: Dataset, data: ConfigDict, first_row: int
) -> Schedule:
    """Return the schedule of a configuration; constant shares without one."""
    if data.schedule:
        knots = parse_schedule(data.schedule, len(parts))
        return Schedule(tuple(Knot(first_row + rows_before(data, k.at), k.weights) for k in knots))
    if data.epochs:
        shares = [len(part) * passes for part, passes in zip(parts, data.epochs, strict=True)]
    else:
        shares = list(_shares(dataset))
    return Schedule((Knot(0, tuple(map(float, shares))),))


def epochs_by_step(
    parts: Sequence[Examples], dataset: Dataset, data: ConfigDict, first_row: int
) -> Callable[[int], dict[str, float]]:
    """Return a function from a step to the passes over each corpus so far, "epoch/NAME".

    The parts of a corpus are summed. For arguments see `shuffle_and_mix`.
    """
    schedule = _schedule(parts, dataset, data, first_row)
    names = [f"epoch/{store.manifest.source}" for store in dataset.train]
    sizes = list(map(len, parts))

    def epochs(step: int) -> dict[str, float]:
        read = schedule.epochs(first_row + rows_before(data, step), sizes)
        sums = dict.fromkeys(names, 0.0)
        for name, passes in zip(names, read, strict=True):
            sums[name] += passes
        return sums

    return epochs


def continues_mixture(before: ConfigDict, after: ConfigDict, step: int) -> bool:
    """Return whether a changed mixture gives the same batches before a step.

    Sources may be appended if their weight is 0 until then. This requires a schedule for the
    earlier weights, except for a single source.

    Args:
        before: section `data` of the earlier mixture.
        after: section `data` of the new mixture.
        step: first step whose batch may differ.
    """
    sources, more = listed(before.source), listed(after.source)
    schedule = before.get("schedule", "")  # runs of older versions have none
    has_past = schedule or len(sources) == 1
    if not (has_past and after.schedule and more[: len(sources)] == sources):
        return False
    none = (0.0,) * (len(more) - len(sources))
    knots = parse_schedule(schedule or "0: 1", len(sources))
    old = Schedule(tuple(Knot(knot.at, knot.weights + none) for knot in knots))
    new = Schedule(parse_schedule(after.schedule, len(more)))
    ends = sorted({0, step, *(k.at for k in (*old.knots, *new.knots) if k.at < step)})
    middles = [(a + b) / 2 for a, b in pairwise(ends)]  # between ends the counts are quadratic
    return all(
        np.allclose(old.examples_before(at), new.examples_before(at), rtol=1e-9, atol=1e-6)
        for at in (*ends, *middles)
    )
