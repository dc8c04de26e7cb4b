"""Parametric scaling law L(N, D) = E + A/N^α + B/D^β: fit, optimum and bootstrap.

Hoffmann et al. 2022 (arXiv 2203.15556), approach 3: Huber loss of the log-losses by L-BFGS from
many starts; optimum by their eq. 4. Bootstrap over runs as in Besiroglu et al. 2024
(arXiv 2404.10102).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize
from scipy.special import logsumexp

from lm.errors import UserError
from lm.tools.reports.scaling_runs import Runs

HUBER_DELTA = 1e-3


class Law(NamedTuple):
    """Coefficients of the law of the loss in nats a token."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, n: ArrayLike, d: ArrayLike) -> np.ndarray:
        """Return the loss of `n` parameters and `d` tokens."""
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

    u and v are log N and log D, centered: a and b then hardly depend on α and β, and L-BFGS needs
    few iterations. The minimum is that of the uncentered problem.
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
        """Return starts: 3 values of E below the least loss, 3 splits of the rest, 4 × 4 slopes."""
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
        UserError: There are fewer than 6 runs, 3 sizes or 3 numbers of tokens for the five
            unknowns, or the fit is not finite and positive.
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
    """Fit laws to resampled runs, each by descent from `law`."""
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
