"""Grouped matrix products (one kernel per group of rows), and the permutation of rows into groups.

Shape letters: T rows, S slots, K slots per row, E groups, D inputs, F outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.lax import RaggedDotDimensionNumbers, ragged_dot_general

# Dimension numbers of the products: rows by kernels, and both gradients.
_DIMENSIONS = {
    "forward": RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), [0], [0]),
    "by_input": RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0]),
    "by_kernel": RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], []),
}
_KINDS = ("forward", "by_input")


@dataclass(frozen=True)
class GroupedKernel:
    """Implementation of grouped products.

    Attributes:
        name: "xla", "megablox" for TPUs, or "tokamax" for GPUs.
        n_rows: typical total number of rows in groups, by which megablox chooses tiles.
        interpret: run megablox on any platform, slowly, for tests.
    """

    name: str = "xla"
    n_rows: int = 0
    interpret: bool = False

    @property
    def is_call(self) -> bool:
        """True if it is a library call that XLA cannot fuse with surrounding operations."""
        return self.name != "xla"

    def __call__(
        self, kind: str, a: jax.Array, b: jax.Array, sizes_E: jax.Array, dtype: jnp.dtype
    ) -> jax.Array:
        """Multiply like `megablox.grouped_product`; rows after the last group are 0."""
        if self.name == "megablox":
            from lm.kernels.megablox import grouped_product

            y = grouped_product(kind, a, b, sizes_E, self.n_rows, dtype, self.interpret)
        elif self.name == "tokamax" and _has_gpu_tiles(a, b):
            from lm.kernels.gpu_grouped_matmul import grouped_product_on_gpu

            y = grouped_product_on_gpu(kind, a, b, sizes_E, self.n_rows, dtype)
        else:
            y = ragged_dot_general(
                a, b, sizes_E, _DIMENSIONS[kind], preferred_element_type=jnp.float32
            )
        if kind != "by_kernel":
            y = jnp.where((jnp.arange(y.shape[0]) < sizes_E.sum())[:, None], y, 0)
        return y.astype(dtype)


def _has_gpu_tiles(a: jax.Array, b: jax.Array) -> bool:
    from lm.kernels.gpu_grouped_matmul import LEAST

    return all(width % LEAST == 0 for width in (a.shape[1], *b.shape[1:]))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def grouped_matmul(
    x_TD: jax.Array,
    kernel_EDF: jax.Array,
    sizes_E: jax.Array,
    dtype: jnp.dtype,
    out_dtype: jnp.dtype,
    multiply: GroupedKernel,
    transposed: bool = False,
) -> jax.Array:
    """Multiply each group of rows by its own kernel.

    Operands and gradients are rounded to `dtype` and accumulated in float32, as in `dense.matmul`;
    the kernel gradient is float32.

    Args:
        x_TD: rows, sorted by group.
        kernel_EDF: kernels.
        sizes_E: number of rows of each group; rows after the last group give 0.
        dtype: compute dtype.
        out_dtype: dtype of the result.
        multiply: implementation of the products.
        transposed: whether kernels are stored as [E, F, D].

    Returns:
        Products [T, F].
    """
    return _forward(x_TD, kernel_EDF, sizes_E, dtype, out_dtype, multiply, transposed)[0]


def _forward(
    x_TD: jax.Array,
    kernel_EDF: jax.Array,
    sizes_E: jax.Array,
    dtype: jnp.dtype,
    out_dtype: jnp.dtype,
    multiply: GroupedKernel,
    transposed: bool,
) -> tuple[jax.Array, tuple]:
    x, kernel = x_TD.astype(dtype), kernel_EDF.astype(dtype)
    y = multiply(_KINDS[transposed], x, kernel, sizes_E, out_dtype)
    return y, (x, kernel, sizes_E, jnp.zeros_like(x_TD, shape=(0,)))


def _backward(
    dtype: jnp.dtype,
    out_dtype: jnp.dtype,
    multiply: GroupedKernel,
    transposed: bool,
    residuals: tuple,
    g_TF: jax.Array,
) -> tuple[jax.Array, jax.Array, None]:
    x, kernel, sizes_E, like_x = residuals
    g = g_TF.astype(dtype)
    dx = multiply(_KINDS[not transposed], g, kernel, sizes_E, like_x.dtype)
    if transposed:
        x, g = g, x
    return dx, multiply("by_kernel", x, g, sizes_E, jnp.dtype(jnp.float32)), None


grouped_matmul.defvjp(_forward, _backward)


@jax.custom_vjp
def permute_rows(x_TD: jax.Array, source_S: jax.Array, slots_TK: jax.Array) -> jax.Array:
    """Gather rows into slots, with a gather instead of a scatter as the gradient.

    Args:
        x_TD: rows.
        source_S: row of each slot; T for an empty slot, which gives 0.
        slots_TK: slots of each row, the inverse of `source_S`; S for none.

    Returns:
        Slots [S, D].
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
