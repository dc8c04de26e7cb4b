"""Products of linear maps in 8 bits: int8, or float8.

Every vector that a product sums over has a scale of its own, taken from its largest value: nothing
has to be kept from step to step, and a restarted run repeats its steps exactly.

Shape letters: T tokens, D inputs, F outputs; other leading dimensions may come before T.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Dtypes of activations and kernels, and of gradients, whose range is wider (Micikevicius et al.
# 2022). With int8 the kernel's gradient, a sum over all tokens, is computed in the compute dtype.
FORMATS: dict[str, tuple[Any, Any]] = {
    "int8": (jnp.int8, jnp.int8),
    "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2),
}


class Quantized(NamedTuple):
    """Array in 8 bits, and its scales with dimensions of 1 where they are shared."""

    values: jax.Array
    scales: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def quantized_matmul(
    x_TD: jax.Array, kernel_DF: jax.Array, dtype: jnp.dtype, precision: str
) -> jax.Array:
    """Multiply by a kernel in 8 bits.

    Args:
        x_TD: activations [..., T, D].
        kernel_DF: float32 kernel.
        dtype: compute dtype of what is not in 8 bits.
        precision: "int8" or "fp8".

    Returns:
        The product, [..., T, F] float32.
    """
    return _forward(x_TD, kernel_DF, dtype, precision)[0]


def _forward(x_TD: jax.Array, kernel_DF: jax.Array, dtype: jnp.dtype, precision: str) -> tuple:
    of_values, _ = FORMATS[precision]
    x, kernel = quantize(x_TD, of_values, -1), quantize(kernel_DF, of_values, 0)
    y_TF = _dot(x.values, kernel.values, (-1,), (0,)) * x.scales * kernel.scales
    # An empty array carries the dtype that the gradient of x must have.
    return y_TF, (x_TD.astype(dtype), kernel_DF, jnp.zeros((0,), x_TD.dtype))


def _backward(
    dtype: jnp.dtype, precision: str, residuals: tuple, g_TF: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x_TD, kernel_DF, like_x = residuals
    of_values, of_gradients = FORMATS[precision]
    g, kernel = quantize(g_TF, of_gradients, -1), quantize(kernel_DF, of_values, 1)
    dx_TD = _dot(g.values, kernel.values, (-1,), (1,)) * g.scales * kernel.scales[:, 0]
    tokens = tuple(range(g_TF.ndim - 1))
    if precision == "int8":
        dkernel_DF = _dot(x_TD, g_TF.astype(dtype), tokens, tokens)
    else:
        x, g = quantize(x_TD, of_values, tokens), quantize(g_TF, of_gradients, tokens)
        scales_DF = x.scales.reshape(-1, 1) * g.scales.reshape(-1)
        dkernel_DF = _dot(x.values, g.values, tokens, tokens) * scales_DF
    return dx_TD.astype(like_x.dtype), dkernel_DF


quantized_matmul.defvjp(_forward, _backward)


def quantize(x: jax.Array, dtype: Any, axes: int | tuple[int, ...]) -> Quantized:
    """Round an array to 8 bits.

    Args:
        x: array of floating point.
        dtype: int8 or a float8 type.
        axes: axes whose elements share a scale: those that a product sums over.
    """
    is_integer = jnp.issubdtype(dtype, jnp.integer)
    limit = float(jnp.iinfo(dtype).max if is_integer else jnp.finfo(dtype).max)
    x = x.astype(jnp.float32)
    # Smaller scales would be flushed to 0; that of a NaN stays NaN, which int8 values cannot be.
    smallest = jnp.finfo(jnp.float32).tiny
    scales = jnp.maximum(jnp.abs(x).max(axes, keepdims=True) / limit, smallest)
    x = jnp.clip(x / scales, -limit, limit)
    return Quantized((jnp.round(x) if is_integer else x).astype(dtype), scales)


def _dot(x: jax.Array, y: jax.Array, x_axes: tuple, y_axes: tuple) -> jax.Array:
    """Sum over axes of both operands: exactly, in int32, for integers; in float32 for others."""
    sums = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    contracted = tuple(axis % x.ndim for axis in x_axes), y_axes
    return jax.lax.dot_general(x, y, (contracted, ((), ())), preferred_element_type=sums).astype(
        jnp.float32
    )
