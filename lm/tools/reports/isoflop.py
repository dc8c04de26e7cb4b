"""IsoFLOP profiles: at one compute budget a parabola of loss over log N, and its minimum.

Hoffmann et al. 2022 (arXiv 2203.15556), approach 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lm.tools.reports.scaling_runs import Runs

SAME_BUDGET = 0.1  # FLOPs within so much of the middle's, as a logarithm, are one budget
FEWEST_SIZES = 4


@dataclass(frozen=True)
class Profile:
    """The runs of one budget, and their parabola in log N, highest power first."""

    runs: Runs
    parabola: np.ndarray

    @property
    def flop(self) -> float:
        return float(np.exp(np.log(self.runs.flop).mean()))

    @property
    def n(self) -> float:
        """The size of least loss."""
        return float(np.exp(-self.parabola[1] / (2 * self.parabola[0])))

    @property
    def loss(self) -> float:
        return float(np.polyval(self.parabola, np.log(self.n)))

    @property
    def has_minimum(self) -> bool:
        """Whether the parabola opens upwards and its minimum lies between the sizes that ran."""
        return bool(self.parabola[0] > 0 and self.runs.n.min() <= self.n <= self.runs.n.max())


class PowerLaw(NamedTuple):
    """N_opt = factor · C^exponent."""

    factor: float
    exponent: float

    def n(self, flop: float) -> float:
        return self.factor * flop**self.exponent


def profiles(runs: Runs) -> list[Profile]:
    """A profile of each budget at which at least four sizes ran, by budget.

    Budgets are found by density: the FLOPs with the most runs near them first.
    """
    left, found = runs, []
    while len(left):
        log_flop = np.log(left.flop)
        near = np.abs(log_flop[:, None] - log_flop) <= SAME_BUDGET
        chosen = near[np.argmax(near.sum(axis=1))]
        if len(np.unique(left.n[chosen])) >= FEWEST_SIZES:
            found.append(_profile(left[chosen]))
        left = left[~chosen]
    return sorted(found, key=lambda profile: profile.flop)


def _profile(runs: Runs) -> Profile:
    return Profile(runs, np.polyfit(np.log(runs.n), runs.loss, 2))


def power_law(found: list[Profile]) -> PowerLaw | None:
    """The line through the minima in log-log; None with fewer than two budgets that have one."""
    minima = [profile for profile in found if profile.has_minimum]
    if len(minima) < 2:
        return None
    log_flop, log_n = np.log([p.flop for p in minima]), np.log([p.n for p in minima])
    exponent, intercept = np.polyfit(log_flop, log_n, 1)
    return PowerLaw(float(np.exp(intercept)), float(exponent))


def bootstrap_exponents(found: list[Profile], resamples: int, seed: int) -> list[float]:
    """Exponents of the power law, the runs of each budget drawn anew with replacement."""
    random = np.random.default_rng(seed)
    exponents = []
    for _ in range(resamples):
        drawn = [p.runs[random.integers(len(p.runs), size=len(p.runs))] for p in found]
        law = power_law([_profile(runs) for runs in drawn if len(np.unique(runs.n)) >= 3])
        exponents += [law.exponent] if law else []
    return exponents
