"""IsoFLOP isoflop_profiles: budgets are separated, minima of exact parabolas are found."""

import numpy as np
import pytest

from lm.tools.reports.scaling_law import Runs, bootstrap_exponents, isoflop_profiles, power_law

BUDGETS = (1e18, 3e18, 1e19)


def optimal(flop: float) -> float:
    return 0.1 * flop**0.48


def study(spread: float = 0.0, noise: float = 0.0, shift: float = 1.0, seed: int = 0) -> Runs:
    """Seven sizes about the best of each budget, on a parabola; budgets are met within `spread`."""
    random = np.random.default_rng(seed)
    n = np.concatenate([shift * optimal(c) * np.geomspace(0.25, 4, 7) for c in BUDGETS])
    flop = np.repeat(BUDGETS, 7)
    loss = 3 + 0.05 * np.log(n / optimal(flop)) ** 2 + random.normal(0, noise, n.shape)
    return Runs(n, flop * np.exp(random.uniform(-spread, spread, n.shape)) / (6 * n), loss)


def test_minima_and_their_power_law():
    found = isoflop_profiles(study())
    assert [profile.flop for profile in found] == pytest.approx(BUDGETS)
    assert [profile.n for profile in found] == pytest.approx([optimal(c) for c in BUDGETS])
    law = power_law(found)
    assert law.exponent == pytest.approx(0.48)
    assert law.n(1e21) == pytest.approx(optimal(1e21))


def test_runs_near_a_budget_belong_to_it():
    assert [len(profile.runs) for profile in isoflop_profiles(study(spread=0.04))] == [7, 7, 7]


def test_minimum_beyond_the_sizes_that_ran_does_not_count():
    found = isoflop_profiles(study(shift=8))
    assert len(found) == 3
    assert not any(profile.has_minimum for profile in found)
    assert power_law(found) is None


def test_bootstrap_knows_how_uncertain_the_exponent_is():
    """Its spread is that of the exponents of studies made anew."""
    anew = [
        power_law(isoflop_profiles(study(noise=0.003, seed=seed))).exponent for seed in range(100)
    ]
    guessed = np.std(bootstrap_exponents(isoflop_profiles(study(noise=0.003)), 200, seed=0))
    assert np.std(anew) / 2 < guessed < 2 * np.std(anew)
    assert abs(np.mean(anew) - 0.48) < np.std(anew) / 2
