"""IsoFLOP profiles: for each compute budget the minimum of a parabola of loss over log N.

Hoffmann et al. 2022 (arXiv 2203.15556), approach 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lm.tools.reports.scaling_runs import Runs

SAME_BUDGET = 0.1  # largest difference of log FLOPs within one budget
FEWEST_SIZES = 4


@dataclass(frozen=True)
class Profile:
    """Runs of one budget and their parabola in log N (coefficients as of `np.polyfit`)."""

    runs: Runs
    parabola: np.ndarray

    @property
    def flop(self) -> float:
        """Budget: geometric mean of the runs' FLOPs."""
        return float(np.exp(np.log(self.runs.flop).mean()))

    @property
    def n(self) -> float:
        """Number of parameters at the minimum."""
        return float(np.exp(-self.parabola[1] / (2 * self.parabola[0])))

    @property
    def loss(self) -> float:
        """Loss at the minimum."""
        return float(np.polyval(self.parabola, np.log(self.n)))

    @property
    def has_minimum(self) -> bool:
        """True if the parabola is convex and its minimum is within the sizes of the runs."""
        return bool(self.parabola[0] > 0 and self.runs.n.min() <= self.n <= self.runs.n.max())


class PowerLaw(NamedTuple):
    """N_opt = factor · C^exponent."""

    factor: float
    exponent: float

    def n(self, flop: float) -> float:
        """Return the optimal number of parameters of a budget."""
        return self.factor * flop**self.exponent


def profiles(runs: Runs) -> list[Profile]:
    """Return a profile of each budget with at least four sizes, in the order of budgets.

    Budgets are found by density: the FLOPs with the most runs nearby come first.
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
    """Fit a line through the minima in log-log; None for fewer than two minima."""
    minima = [profile for profile in found if profile.has_minimum]
    if len(minima) < 2:
        return None
    log_flop, log_n = np.log([p.flop for p in minima]), np.log([p.n for p in minima])
    exponent, intercept = np.polyfit(log_flop, log_n, 1)
    return PowerLaw(float(np.exp(intercept)), float(exponent))


def bootstrap_exponents(found: list[Profile], resamples: int, seed: int) -> list[float]:
    """Return exponents of the power law, with the runs of each budget resampled."""
    random = np.random.default_rng(seed)
    exponents = []
    for _ in range(resamples):
        drawn = [p.runs[random.integers(len(p.runs), size=len(p.runs))] for p in found]
        law = power_law([_profile(runs) for runs in drawn if len(np.unique(runs.n)) >= 3])
        exponents += [law.exponent] if law else []
    return exponents
