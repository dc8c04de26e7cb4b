"""Grouped matrix products on NVIDIA GPUs, with tokamax's Triton kernels.

XLA would multiply all rows by the kernels of all groups. Here row tiles start at group boundaries,
so each group has one partial tile. The kernel's real cost is encoded in the name of its operation,
as in `megablox.py`.

Shape letters: T rows, D inputs, F outputs, E groups.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lm.kernels.gpu_attention import capability_problem, tokamax_problem

LEAST = 16  # widths that are not multiples of it are left to XLA
_ROWS, _LARGEST, _SUMMED = 128, 128, 32  # tile sizes, from tokamax's heuristics


def grouped_product_on_gpu(
    kind: str, a: jax.Array, b: jax.Array, sizes_E: jax.Array, n_rows: int, out_dtype: jnp.dtype
) -> jax.Array:
    """Multiply by groups of rows.

    Args:
        kind: "forward", "by_input" or "by_kernel", see `megablox.grouped_product`.
        a: rows, sorted by group.
        b: kernels, or rows; widths are multiples of `LEAST`.
        sizes_E: number of rows of each group.
        n_rows: typical total number of rows in groups, for the stated cost.
        out_dtype: dtype of the result; accumulation is in float32.

    Returns:
        Product; rows after the last group are undefined.
    """
    from tokamax._src.ops.ragged_dot import base, pallas_triton

    kernels = b.swapaxes(1, 2) if kind == "by_input" else b
    D, F = a.shape[1], kernels.shape[-1]
    by_kernel = kind == "by_kernel"
    config = pallas_triton.Config(
        block_m=_tile(D) if by_kernel else _ROWS,
        block_n=_tile(F),
        block_k=_SUMMED,
        num_warps=4,
        num_stages=4,
    )
    options = {"group_sizes": sizes_E, "precision": None, "out_dtype": out_dtype, "config": config}
    n_rows = max(min(n_rows, len(a)), 1)
    rows = n_rows if by_kernel else n_rows + min(len(sizes_E), n_rows) * _ROWS // 2
    read = a.size * a.dtype.itemsize + kernels.size * b.dtype.itemsize
    written = (len(sizes_E) * D if by_kernel else len(a)) * F * jnp.dtype(out_dtype).itemsize
    with jax.named_scope(f"cost_flops_{2 * rows * D * F}_bytes_{read + written}"):
        if by_kernel:
            numbers = base.RAGGED_CONTRACTING_DOT_DIM_NUMS
            return pallas_triton._ragged_contracting_dim_dot(
                a, b, ragged_dot_dimension_numbers=numbers, **options
            )
        return pallas_triton._ragged_dot(
            a,
            kernels,
            ragged_dot_dimension_numbers=base.DEFAULT_RAGGED_DOT_DIM_NUMS,
            split_k_intermediate_dtype=None,
            **options,
        )


def _tile(width: int) -> int:
    """Return the largest tile that divides a width; the kernels do not mask partial tiles."""
    return next(size for size in (_LARGEST, 64, 32, LEAST) if width % size == 0)


def gpu_grouped_problem(capability: str) -> str:
    """Return why these kernels cannot run on a GPU, or "".

    Args:
        capability: compute capability of the GPU; "": unknown.
    """
    return tokamax_problem() or capability_problem(capability)
