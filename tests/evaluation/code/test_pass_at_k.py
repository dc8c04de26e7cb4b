from fractions import Fraction
from itertools import combinations

import pytest

from lm.evaluation.code.pass_at_k import pass_at_k
from lm.evaluation.code.pass_rates import code_figures


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_fraction_of_k_subsets_with_a_pass(n):
    for n_passed in range(n + 1):
        outcomes = [i < n_passed for i in range(n)]
        for k in range(1, n + 1):
            sets = list(combinations(outcomes, k))
            expected = Fraction(sum(map(any, sets)), len(sets))
            assert pass_at_k(n, n_passed, k) == pytest.approx(float(expected), abs=1e-12)


def test_figures_are_means_over_problems_in_percent():
    outcomes = {"a": [True, False, False, False], "b": [True] * 4, "c": [False] * 4}
    records = [{"task_id": k, "passed": x} for k, found in outcomes.items() for x in found]
    figures = code_figures(records, [1, 2])
    assert figures == pytest.approx({"pass@1": 100 * 1.25 / 3, "pass@2": 100 * 1.5 / 3})
