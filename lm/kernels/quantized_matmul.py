"""8-bit matrix products (int8 or float8) for training.

Every vector along the contracted axis is scaled by its largest magnitude at that step, so there is
no quantization state, and a restarted run repeats its steps exactly.

Shape letters: T tokens, D inputs, F outputs; other leading dimensions may come before T.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Dtypes of activations and kernels, and of gradients, which need more range (Micikevicius et al.
# 2022). With int8 the kernel gradient, a sum over all tokens, is computed in the compute dtype.
FORMATS: dict[str, tuple[Any, Any]] = {
    "int8": (jnp.int8, jnp.int8),
    "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2),
}


class Quantized(NamedTuple):
    """8-bit array and its scales, which have size 1 along shared axes."""

    values: jax.Array
    scales: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def quantized_matmul(
    x_TD: jax.Array, kernel_DF: jax.Array, dtype: jnp.dtype, precision: str
) -> jax.Array:
    """Multiply by a kernel in 8 bits, with 8-bit gradients.

    Args:
        x_TD: activations [..., T, D].
        kernel_DF: float32 kernel.
        dtype: compute dtype of products that are not in 8 bits.
        precision: "int8" or "fp8".

    Returns:
        Product [..., T, F], float32.
    """
    return _forward(x_TD, kernel_DF, dtype, precision)[0]


def _forward(x_TD: jax.Array, kernel_DF: jax.Array, dtype: jnp.dtype, precision: str) -> tuple:
    of_values, _ = FORMATS[precision]
    x, kernel = quantize(x_TD, of_values, -1), quantize(kernel_DF, of_values, 0)
    y_TF = _dot(x.values, kernel.values, (-1,), (0,)) * x.scales * kernel.scales
    # An empty array carries the dtype of the gradient of x.
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
    """Quantize an array to 8 bits.

    Args:
        x: floating-point array.
        dtype: int8 or a float8 type.
        axes: axes that share a scale: those a product contracts.
    """
    is_integer = jnp.issubdtype(dtype, jnp.integer)
    limit = float(jnp.iinfo(dtype).max if is_integer else jnp.finfo(dtype).max)
    x = x.astype(jnp.float32)
    # Smaller scales would be flushed to 0. The scale of a NaN is NaN, since int8 has none.
    smallest = jnp.finfo(jnp.float32).tiny
    scales = jnp.maximum(jnp.abs(x).max(axes, keepdims=True) / limit, smallest)
    x = jnp.clip(x / scales, -limit, limit)
    return Quantized((jnp.round(x) if is_integer else x).astype(dtype), scales)


def _dot(x: jax.Array, y: jax.Array, x_axes: tuple, y_axes: tuple) -> jax.Array:
    """Contract axes of both operands, in exact int32 for integers and float32 otherwise."""
    sums = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    contracted = tuple(axis % x.ndim for axis in x_axes), y_axes
    return jax.lax.dot_general(x, y, (contracted, ((), ())), preferred_element_type=sums).astype(
        jnp.float32
    )
