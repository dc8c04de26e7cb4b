"""Scaling laws of runs: the runs, the parametric law L(N, D) = E + A/N^α + B/D^β, IsoFLOP profiles.

N counts all parameters, including embeddings, and training costs C = 6·N·D FLOPs, as in Hoffmann et
al. 2022 (arXiv 2203.15556). The law is their approach 3: Huber loss of log-losses by L-BFGS from
many starts; optimum by their eq. 4; bootstrap over runs as in Besiroglu et al. 2024 (arXiv
2404.10102). Profiles are their approach 2: for each compute budget, the minimum of a parabola of
loss over log N.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize
from scipy.special import logsumexp

from lm.errors import UserError
from lm.tools.reports.run_records import TRAIN_LOSS, VALIDATION_LOSS, find_runs

COLUMNS = "Model Size", "Training FLOP", "loss"


@dataclass(frozen=True)
class Runs:
    """Arrays over runs, [runs].

    Attributes:
        n: Parameters.
        d: Training tokens.
        loss: Final loss, nats per token.
    """

    n: np.ndarray
    d: np.ndarray
    loss: np.ndarray

    def __len__(self) -> int:
        return len(self.n)

    def __getitem__(self, chosen: np.ndarray) -> Runs:
        """Select runs by a mask or by indices."""
        return Runs(self.n[chosen], self.d[chosen], self.loss[chosen])

    @property
    def flop(self) -> np.ndarray:
        """Training FLOPs, 6·N·D."""
        return 6 * self.n * self.d


def runs_of_table(file: Path) -> Runs:
    """Read a CSV table with the columns `Model Size`, `Training FLOP` and `loss`.

    Raises:
        UserError: A column is missing, or a cell is not a positive number.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --runs {file}: {error}") from None
    for column in COLUMNS:
        if rows and column not in rows[0]:
            raise UserError(f"--runs {file} has no column {column!r}; it has {list(rows[0])}")
    table = np.array([_row(file, line, row) for line, row in enumerate(rows, 2)])
    n, flop, loss = table.reshape(-1, 3).T
    return Runs(n, flop / (6 * n), loss)


def _row(file: Path, line: int, row: Mapping[str, str]) -> list[float]:
    try:
        values = [float(row[column]) for column in COLUMNS]
    except (TypeError, ValueError):
        values = [math.nan]
    if not all(0 < value < math.inf for value in values):
        shown = ", ".join(f"{column}={row[column]!r}" for column in COLUMNS)
        raise UserError(f"--runs {file}, line {line}: expected three positive numbers: {shown}")
    return values


def runs_of_folder(workdir: Path) -> tuple[Runs, list[str]]:
    """Read the finished runs of a sweep.

    The loss is that of the last evaluation or, if no run was evaluated, of the end of training.

    Returns:
        The runs, and one line for each excluded run.
    """
    found = find_runs(workdir)
    evaluated = any(VALIDATION_LOSS in run.curves for run in found)
    metric = VALIDATION_LOSS if evaluated else TRAIN_LOSS
    points, left_out = [], []
    for run in found:
        loss = run.final(metric)
        if run.problem:
            left_out.append(f"{run.name}: {run.problem}")
        elif not run.finished:
            at = f"at step {run.last_step} of {run.config['train.steps']}"
            left_out.append(f"{run.name}: not finished, {at}")
        elif loss is None or run.size is None:
            left_out.append(f"{run.name}: no finite {metric}")
        else:
            points.append((run.size.parameters, run.tokens, loss))
    return Runs(*np.array(points, float).reshape(-1, 3).T), left_out


HUBER_DELTA = 1e-3


class Law(NamedTuple):
    """Coefficients of the law, for loss in nats per token."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, n: ArrayLike, d: ArrayLike) -> np.ndarray:
        """Return the loss for `n` parameters and `d` tokens."""
        n, d = np.asarray(n, float), np.asarray(d, float)
        return self.E + self.A * n**-self.alpha + self.B * d**-self.beta

    @property
    def exponent(self) -> float:
        """Exponent a of N_opt ∝ C^a; D_opt ∝ C^(1-a)."""
        return self.beta / (self.alpha + self.beta)

    def optimum(self, flop: float) -> tuple[float, float]:
        """Return the N and D of least loss with 6·N·D = `flop` (Hoffmann et al., eq. 4)."""
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        n = ratio * (flop / 6) ** self.exponent
        return n, flop / (6 * n)


class _Problem:
    """Objective over (a, b, e, α, β); the terms of the loss are e^(a-αu), e^(b-βv) and e^e.

    u and v are centered log N and log D, so that a and b hardly depend on α and β, and L-BFGS needs
    few iterations. The minimum equals that of the uncentered problem.
    """

    def __init__(self, runs: Runs):
        log_n, log_d = np.log(runs.n), np.log(runs.d)
        self.middle = log_n.mean(), log_d.mean()
        self.u, self.v = log_n - self.middle[0], log_d - self.middle[1]
        self.log_loss = np.log(runs.loss)

    def objective(self, p: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the sum of Huber losses in units of δ², and its gradient."""
        a, b, e, alpha, beta = p
        terms = np.stack([a - alpha * self.u, b - beta * self.v, np.full_like(self.u, e)])
        total = logsumexp(terms, axis=0)
        residual = (total - self.log_loss) / HUBER_DELTA
        size = np.abs(residual)
        value = np.where(size <= 1, residual**2 / 2, size - 0.5).sum()
        slope = np.clip(residual, -1, 1) / HUBER_DELTA
        by_a, by_b, by_e = slope * np.exp(terms - total)
        gradient = by_a.sum(), by_b.sum(), by_e.sum(), -by_a @ self.u, -by_b @ self.v
        return float(value), np.array(gradient)

    def starts(self) -> list[np.ndarray]:
        """Return start points: 3 values of E below the lowest loss × 3 splits × 4 × 4 slopes."""
        least, mean = np.exp(self.log_loss.min()), np.exp(self.log_loss.mean())
        slopes = 0.1, 0.3, 0.6, 1.0
        grid = itertools.product((0.3, 0.7, 0.95), (0.2, 0.5, 0.8), slopes, slopes)
        return [
            np.array([np.log(part * rest), np.log((1 - part) * rest), np.log(share * least), x, y])
            for share, part, x, y in grid
            for rest in [mean - share * least]
        ]

    def solve(self, starts: Iterable[np.ndarray]) -> Law:
        """Return the best minimum that L-BFGS finds from the starts."""
        options = {"maxiter": 2000, "ftol": 1e-13, "gtol": 1e-7}
        ends = (
            minimize(self.objective, start, jac=True, method="L-BFGS-B", options=options)
            for start in starts
        )
        a, b, e, alpha, beta = min(ends, key=lambda end: end.fun).x
        a, b = a + alpha * self.middle[0], b + beta * self.middle[1]
        with np.errstate(over="ignore"):
            return Law(*map(float, (np.exp(e), np.exp(a), np.exp(b), alpha, beta)))

    def at(self, law: Law) -> np.ndarray:
        """Return the variables (a, b, e, α, β) of a law."""
        a = np.log(law.A) - law.alpha * self.middle[0]
        b = np.log(law.B) - law.beta * self.middle[1]
        return np.array([a, b, np.log(law.E), law.alpha, law.beta])


def fit_law(runs: Runs) -> Law:
    """Fit a law to runs.

    Raises:
        UserError: There are fewer than 6 runs, 3 sizes or 3 token counts for the five unknowns, or
            the fit is not finite and positive.
    """
    if len(runs) < 6 or len(np.unique(runs.n)) < 3 or len(np.unique(runs.d)) < 3:
        raise UserError(
            f"{len(runs)} runs of {len(np.unique(runs.n))} model sizes and "
            f"{len(np.unique(runs.d))} numbers of tokens: the law has five unknowns and needs "
            "at least 6 runs, 3 sizes and 3 numbers of tokens"
        )
    problem = _Problem(runs)
    law = problem.solve(problem.starts())
    if not (np.all(np.isfinite(law)) and min(law) > 0):
        raise UserError(f"the runs do not determine the law: {law}; widen their sizes and tokens")
    return law


def bootstrap(runs: Runs, law: Law, resamples: int, seed: int) -> list[Law]:
    """Fit laws to resampled runs, each starting from `law`."""
    random = np.random.default_rng(seed)
    laws = []
    for _ in range(resamples):
        problem = _Problem(runs[random.integers(len(runs), size=len(runs))])
        laws.append(problem.solve([problem.at(law)]))
    return laws


def interval(values: ArrayLike) -> tuple[float, float]:
    """Return the central 95 % interval."""
    low, high = np.quantile(np.asarray(values), (0.025, 0.975))
    return float(low), float(high)


SAME_BUDGET = 0.1  # largest difference of log FLOPs within one budget
FEWEST_SIZES = 4


@dataclass(frozen=True)
class Profile:
    """Runs of one budget and their parabola in log N (coefficients as in `np.polyfit`)."""

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
        """True if the parabola is convex with its minimum within the sizes of the runs."""
        return bool(self.parabola[0] > 0 and self.runs.n.min() <= self.n <= self.runs.n.max())


class PowerLaw(NamedTuple):
    """N_opt = factor · C^exponent."""

    factor: float
    exponent: float

    def n(self, flop: float) -> float:
        """Return the optimal number of parameters of a budget."""
        return self.factor * flop**self.exponent


def isoflop_profiles(runs: Runs) -> list[Profile]:
    """Return a profile of each budget with at least four sizes, in order of budget.

    Budgets are found by density: FLOPs with the most runs nearby come first.
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
    """Return bootstrap exponents of the power law, resampling the runs of each budget."""
    random = np.random.default_rng(seed)
    exponents = []
    for _ in range(resamples):
        drawn = [p.runs[random.integers(len(p.runs), size=len(p.runs))] for p in found]
        law = power_law([_profile(runs) for runs in drawn if len(np.unique(runs.n)) >= 3])
        exponents += [law.exponent] if law else []
    return exponents
