"""pass@k: the probability that one of k samples passes."""

from __future__ import annotations

from math import comb


def pass_at_k(n: int, n_passed: int, k: int) -> float:
    """Return the unbiased estimate of pass@k (Chen et al. 2021, eq. 1).

    It is the share of the sets of k of the samples in which one at least passes.

    Args:
        n: samples of a problem, at least k.
        n_passed: samples that pass.
        k: samples that are drawn.
    """
    return 1 - comb(n - n_passed, k) / comb(n, k)
