"""Fit of known laws, its gradient, and the coverage of its intervals."""

import numpy as np
import pytest
from scipy.optimize import check_grad

from lm.errors import UserError
from lm.tools.reports.scaling_law import Law, Runs, _Problem, bootstrap, fit_law
from lm.tools.reports.scaling_study import forecast

TRUTH = Law(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)  # Besiroglu et al. 2024


def grid(law: Law = TRUTH, scatter: float = 0.0, seed: int = 0) -> Runs:
    n, d = (x.ravel() for x in np.meshgrid(np.geomspace(5e7, 8e9, 6), np.geomspace(1e9, 4e11, 6)))
    noise = np.random.default_rng(seed).normal(0, scatter, n.shape)
    return Runs(n, d, law.loss(n, d) * np.exp(noise))


@pytest.mark.parametrize(
    "law", [TRUTH, Law(0.9, 12.0, 40.0, 0.21, 0.15)], ids=["chinchilla", "flat"]
)
def test_law_without_scatter_is_found(law):
    np.testing.assert_allclose(fit_law(grid(law)), law, rtol=1e-3)


def test_outliers_hardly_change_the_law():
    runs = grid()
    loss = runs.loss.copy()
    loss[::9] *= 1.5
    found = fit_law(Runs(runs.n, runs.d, loss))
    assert found.alpha == pytest.approx(TRUTH.alpha, abs=0.01)
    assert found.beta == pytest.approx(TRUTH.beta, abs=0.01)


def test_gradient_matches_the_objective():
    problem = _Problem(grid(scatter=0.01))
    point = problem.at(TRUTH) * 1.05
    slope = np.linalg.norm(problem.objective(point)[1])
    error = check_grad(
        lambda p: problem.objective(p)[0], lambda p: problem.objective(p)[1], point, epsilon=1e-7
    )
    assert error < 1e-4 * slope


def test_objective_is_the_papers():
    """Hoffmann et al., eq. 3: Huber of δ = 1e-3 of the difference of log-losses, summed."""
    runs, law = grid(scatter=0.002), Law(1.7, 400.0, 2000.0, 0.34, 0.36)
    problem = _Problem(runs)
    difference = np.abs(np.log(law.E + law.A / runs.n**0.34 + law.B / runs.d**0.36)
                        - np.log(runs.loss))  # fmt: skip
    huber = [x**2 / 2 if x <= 1e-3 else 1e-3 * (x - 5e-4) for x in difference]
    assert problem.objective(problem.at(law))[0] * 1e-6 == pytest.approx(sum(huber), rel=1e-6)


def test_optimum_is_the_least_loss_of_a_budget():
    flop = 5.76e23
    n = np.geomspace(1e9, 1e12, 200_001)
    best = n[np.argmin(TRUTH.loss(n, flop / (6 * n)))]
    found_n, found_d = TRUTH.optimum(flop)
    assert found_n == pytest.approx(best, rel=1e-3)
    assert 6 * found_n * found_d == pytest.approx(flop)


def test_bootstrap_knows_how_uncertain_the_law_is():
    """Its spread is that of the laws of runs made anew, for the slopes and for a forecast."""
    anew = [_nearby(grid(scatter=0.003, seed=seed)) for seed in range(40)]
    studies = [grid(scatter=0.003, seed=seed) for seed in range(40, 44)]
    spreads = [bootstrap(runs, _nearby(runs), resamples=30, seed=1) for runs in studies]
    for quantity in (
        lambda law: law.alpha,
        lambda law: law.beta,
        lambda law: law.E,
        lambda law: float(law.loss(5e10, 1e12)),
    ):
        true = np.std([quantity(law) for law in anew])
        guessed = np.mean([np.std([quantity(law) for law in laws]) for laws in spreads])
        assert true / 1.6 < guessed < 1.6 * true
        assert abs(np.mean([quantity(law) for law in anew]) - quantity(TRUTH)) < true / 2
    assert spreads[0] == bootstrap(studies[0], _nearby(studies[0]), resamples=30, seed=1)


def _nearby(runs: Runs) -> Law:
    problem = _Problem(runs)
    return problem.solve([problem.at(TRUTH)])


def test_interval_of_a_forecast_holds_the_scatter_of_single_runs():
    runs = grid(scatter=0.01)
    found = forecast(runs, TRUTH, [TRUTH] * 2000, None, 1e24, seed=0)
    low, high = found["intervals"]["loss"]
    scatter = np.log(runs.loss / TRUTH.loss(runs.n, runs.d))
    ends = found["loss"] * np.exp(np.quantile(scatter, (0.025, 0.975)))
    np.testing.assert_allclose((low, high), ends, rtol=2e-3)
    assert found["intervals"]["n"] == (found["n"], found["n"])


def test_too_few_runs_are_rejected():
    with pytest.raises(UserError, match="five unknowns"):
        fit_law(grid()[np.arange(5)])
