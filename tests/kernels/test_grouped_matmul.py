"""Grouped products: JAX's TPU kernels, interpreted, against separate products per group."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.kernels.grouped_matmul import GroupedKernel, grouped_matmul
from lm.kernels.megablox import VMEM, choose_tiling

D, F = 24, 40
SIZES = {
    "ragged": (37, 100, 3, 60),  # tiles are shared, and 50 rows belong to no group
    "empty": (0, 130, 0, 70),
    "one takes all": (0, 0, 250, 0),
    "nothing": (0, 0, 0, 0),
    "whole tiles": (128, 0, 122, 0),
}


def expected(x, kernel, sizes, g):
    """The products, and the gradients of rows and kernels from those of the products."""
    y, dx, dkernel = np.zeros(g.shape), np.zeros(x.shape), np.zeros(kernel.shape)
    first = 0
    for group, size in enumerate(sizes):
        rows = slice(first, first + size)
        y[rows], dx[rows] = x[rows] @ kernel[group], g[rows] @ kernel[group].T
        dkernel[group] = x[rows].T @ g[rows]
        first += size
    return y, dx, dkernel


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ["xla", "megablox"])
@pytest.mark.parametrize("case", SIZES)
def test_values_and_gradients_match_every_group(name, case, transposed):
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(250, D)), rng.normal(size=(250, F))
    kernel = rng.normal(size=(len(SIZES[case]), D, F))
    multiply = GroupedKernel(name, 250, interpret=True)

    @jax.jit
    def run(x, kernel, g):
        def product(x, kernel):
            kernel = kernel.swapaxes(1, 2) if transposed else kernel
            sizes, float32 = jnp.array(SIZES[case]), jnp.dtype(jnp.float32)
            return grouped_matmul(x, kernel, sizes, float32, float32, multiply, transposed)

        y, pullback = jax.vjp(product, x, kernel)
        return y, *pullback(g)

    found = run(*map(np.float32, (x, kernel, g)))
    for one, other in zip(found, expected(x, kernel, SIZES[case], g), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * (abs(other).max() or 1))


def test_tokamax_gets_each_product_of_a_group(monkeypatch):
    """Its kernels, which no interpreter runs, are replaced by what they state to compute."""
    triton = pytest.importorskip("tokamax._src.ops.ragged_dot.pallas_triton")
    from tokamax._src.ops.ragged_dot import base

    def product(numbers, sum_in_groups):
        def call(a, b, *, group_sizes, ragged_dot_dimension_numbers, config, out_dtype, **_):
            assert ragged_dot_dimension_numbers == numbers
            assert b.shape[-1] % config.block_n == 0
            if sum_in_groups:
                assert a.shape[1] % config.block_m == 0
            found = jax.lax.ragged_dot_general(a, b, group_sizes, numbers)
            after = (jnp.arange(len(found)) >= group_sizes.sum())[:, None]
            found = found if sum_in_groups else jnp.where(after, jnp.nan, found)
            calls.append(sum_in_groups)
            return found.astype(out_dtype)

        return call

    calls = []
    monkeypatch.setattr(triton, "_ragged_dot", product(base.DEFAULT_RAGGED_DOT_DIM_NUMS, False))
    contracting = product(base.RAGGED_CONTRACTING_DOT_DIM_NUMS, True)
    monkeypatch.setattr(triton, "_ragged_contracting_dim_dot", contracting)
    rng, sizes, float32 = np.random.default_rng(0), SIZES["ragged"], jnp.dtype(jnp.float32)
    for width, transposed, n_calls in ((48, False, 3), (48, True, 3), (40, False, 0)):
        calls.clear()
        x, g = rng.normal(size=(250, 32)), rng.normal(size=(250, width))
        kernel = rng.normal(size=(4, 32, width))

        def run(x, kernel, transposed=transposed):
            kernel = kernel.swapaxes(1, 2) if transposed else kernel
            multiply = GroupedKernel("tokamax", 250)
            return grouped_matmul(
                x, kernel, jnp.array(sizes), float32, float32, multiply, transposed
            )

        y, pullback = jax.vjp(run, *map(np.float32, (x, kernel)))
        wanted = expected(x, kernel, sizes, g)
        for one, other in zip((y, *pullback(np.float32(g))), wanted, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * abs(other).max())
        assert len(calls) == n_calls  # XLA multiplies widths that have no tiles


@pytest.mark.parametrize(
    ("sizes", "n_groups", "rows"),
    [
        ((8192, 4096, 14336), 8, 128),
        ((8192, 14336, 4096), 8, 128),
        ((65536, 4096, 14336), 8, 512),
        ((32768, 6144, 16384), 128, 128),
        ((8192, 128, 176), 8, 128),
        ((8, 4096, 14336), 8, 16),
    ],
)
@pytest.mark.parametrize("by_kernel", [False, True])
def test_tiles_fit_and_few_are_shared(by_kernel, sizes, n_groups, rows):
    """Every boundary between groups may add a tile: small ones, unless the rows are many."""
    tiling = choose_tiling(by_kernel, sizes, n_groups, sizes[0], (2, 4 if by_kernel else 2))
    assert tiling.rows == rows
    assert tiling.vmem <= VMEM
    n_tiles = -(-sizes[0] // rows) + n_groups - 1
    assert tiling.flops == 2 * n_tiles * rows * sizes[1] * sizes[2]
    operands = {"x": sizes[0] * sizes[1], "y": sizes[0] * sizes[2]}
    kernels = n_groups * sizes[1] * sizes[2]
    assert tiling.traffic >= 2 * (sum(operands.values()) + kernels)
