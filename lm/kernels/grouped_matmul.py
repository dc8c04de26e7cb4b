"""Grouped matrix products, one kernel a group of rows, and the permutation of rows into groups.

Shape letters: T rows, S slots, K slots of a row, E groups, D inputs, F outputs.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.lax import RaggedDotDimensionNumbers

_ragged = partial(jax.lax.ragged_dot_general, preferred_element_type=jnp.float32)
_FORWARD = RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), [0], [0])
_BY_INPUT = RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])
_BY_KERNEL = RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(
    x_TD: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """Multiply each group of rows by its own kernel.

    Dtypes are those of `dense.matmul`: operands and gradients are rounded to `dtype`, sums are
    float32.

    Args:
        x_TD: rows, sorted by group.
        kernel_EDF: kernels.
        sizes_E: rows of each group; rows after the last group give 0.
        dtype: compute dtype.

    Returns:
        The products, [T, F] float32.
    """
    return _forward(x_TD, kernel_EDF, sizes_E, dtype)[0]


def _forward(
    x_TD: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, tuple]:
    x, kernel = x_TD.astype(dtype), kernel_EDF.astype(dtype)
    y = _zero_ungrouped(_ragged(x, kernel, sizes_E, _FORWARD), sizes_E)
    return y, (x, kernel, sizes_E, jnp.zeros_like(x_TD, shape=(0,)))


def _backward(
    dtype: jnp.dtype, residuals: tuple, g_TF: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x, kernel, sizes_E, like_x = residuals
    g = g_TF.astype(dtype)
    dx = _zero_ungrouped(_ragged(g, kernel, sizes_E, _BY_INPUT), sizes_E)
    return dx.astype(like_x.dtype), _ragged(x, g, sizes_E, _BY_KERNEL), None


grouped_matmul.defvjp(_forward, _backward)


def _zero_ungrouped(y_TF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Zero the undefined rows outside all groups."""
    return jnp.where((jnp.arange(len(y_TF)) < sizes_E.sum())[:, None], y_TF, 0)


@jax.custom_vjp
def permute_rows(x_TD: jax.Array, source_S: jax.Array, slots_TK: jax.Array) -> jax.Array:
    """Gather rows into slots, with a gradient that is a gather too rather than a scatter.

    Args:
        x_TD: rows.
        source_S: row that goes into each slot; T for none, which gives 0.
        slots_TK: slots that each row goes into, the inverse of `source_S`; S for none.

    Returns:
        The slots, [S, D].
    """
    return _take_or_zero(x_TD, source_S)


def _take_or_zero(x: jax.Array, at: jax.Array) -> jax.Array:
    return jnp.take(x, at, axis=0, mode="fill", fill_value=0)


permute_rows.defvjp(
    lambda x, at, slots: (_take_or_zero(x, at), slots),
    lambda slots, g: (
        _take_or_zero(g, slots).sum(1, dtype=jnp.float32).astype(g.dtype),
        None,
        None,
    ),
)
