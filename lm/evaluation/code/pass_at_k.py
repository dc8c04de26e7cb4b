"""pass@k: the probability that one of k samples passes."""

from __future__ import annotations

from math import comb


def pass_at_k(n: int, n_passed: int, k: int) -> float:
    """Return the unbiased estimate of pass@k (Chen et al. 2021, eq. 1).

    It is the fraction of k-subsets of the samples with at least one that passes.

    Args:
        n: number of samples of a problem, at least k.
        n_passed: number of samples that pass.
        k: subset size.
    """
    return 1 - comb(n - n_passed, k) / comb(n, k)
