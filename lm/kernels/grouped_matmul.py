"""Products of rows in groups, each group with a kernel of its own, and moving rows into groups.

Shape letters: T rows, S places, K places of a row, E groups, D inputs, F outputs.
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
def ragged_matmul(
    x_TD: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """The first sizes[0] rows times kernel 0, the next sizes[1] times kernel 1, …: [T, F] float32.

    Rows after the last group give 0. Types are those of `kernels.matmul`: operands and gradients
    are rounded to `dtype`, sums are in float32.
    """
    return _forward(x_TD, kernel_EDF, sizes_E, dtype)[0]


def _forward(
    x_TD: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, tuple]:
    x, kernel = x_TD.astype(dtype), kernel_EDF.astype(dtype)
    y = _in_a_group(_ragged(x, kernel, sizes_E, _FORWARD), sizes_E)
    return y, (x, kernel, sizes_E, jnp.zeros_like(x_TD, shape=(0,)))


def _backward(dtype: jnp.dtype, saved: tuple, g_TF: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, kernel, sizes_E, of_x = saved
    g = g_TF.astype(dtype)
    dx = _in_a_group(_ragged(g, kernel, sizes_E, _BY_INPUT), sizes_E)
    return dx.astype(of_x.dtype), _ragged(x, g, sizes_E, _BY_KERNEL), None


ragged_matmul.defvjp(_forward, _backward)


def _in_a_group(y_TF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """What a kernel leaves in rows of no group is not said to be 0."""
    return jnp.where((jnp.arange(len(y_TF)) < sizes_E.sum())[:, None], y_TF, 0)


@jax.custom_vjp
def move(x_TD: jax.Array, from_S: jax.Array, places_TK: jax.Array) -> jax.Array:
    """Row `from_S[s]` of x in place s, [S, D]; 0 where that is T.

    `places_TK` says the same from the rows' side: the places that each row goes to, S for none.
    With it the gradient is a look-up too, where that of a look-up is a scatter.
    """
    return _rows(x_TD, from_S)


def _rows(x: jax.Array, at: jax.Array) -> jax.Array:
    return jnp.take(x, at, axis=0, mode="fill", fill_value=0)


move.defvjp(
    lambda x, at, places: (_rows(x, at), places),
    lambda places, g: (
        _rows(g, places).sum(1, dtype=jnp.float32).astype(g.dtype),
        None,
        None,
    ),
)
