"""Matrix products of linear layers, with a custom backward pass.

Shape letters: T tokens, D inputs, F outputs; other leading dimensions may come before T.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

_einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(
    x_TD: jax.Array, kernel: jax.Array, dtype: jnp.dtype, transposed: bool = False
) -> jax.Array:
    """Multiply by a kernel in the compute dtype, accumulating in float32.

    JAX's autodiff would multiply a float32 gradient by a bfloat16 kernel, which no matrix unit
    supports. Here the gradient is rounded like the operands; the kernel gradient is float32.

    Args:
        x_TD: activations [..., T, D].
        kernel: float32 [D, F], or [F, D] if `transposed`.
        dtype: compute dtype of both operands.
        transposed: whether the kernel is stored as [F, D].

    Returns:
        Product [..., T, F], float32.
    """
    return matmul_forward(x_TD, kernel, dtype, transposed)[0]


def matmul_forward(
    x_TD: jax.Array, kernel: jax.Array, dtype: Any, transposed: bool, out_dtype: Any = jnp.float32
) -> tuple[jax.Array, tuple]:
    """Return the product and the residuals of its gradient.

    Args:
        x_TD: activations [..., T, D].
        kernel: kernel, see `matmul`.
        dtype: compute dtype.
        transposed: whether the kernel is stored as [F, D].
        out_dtype: dtype of the result.
    """
    kernel_axes = "fd" if transposed else "df"
    x, kernel = x_TD.astype(dtype), kernel.astype(dtype)
    # An empty array carries the dtype of the gradient of x.
    like_x = jnp.zeros((0,), x_TD.dtype)
    y = _einsum(f"...d,{kernel_axes}->...f", x, kernel, preferred_element_type=out_dtype)
    return y, (x, kernel, like_x)


def matmul_backward(
    dtype: Any, transposed: bool, residuals: tuple, g_TF: jax.Array, grad_dtype: Any = jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of x and of the kernel, float32.

    Args:
        dtype: compute dtype.
        transposed: whether the kernel is stored as [F, D].
        residuals: residuals from `matmul_forward`.
        g_TF: gradient of the product.
        grad_dtype: dtype of the gradient of x.
    """
    x, kernel, like_x = residuals
    g = g_TF.astype(dtype)
    kernel_axes = "fd" if transposed else "df"
    dx = _einsum(f"...f,{kernel_axes}->...d", g, kernel, preferred_element_type=grad_dtype)
    # With a leading batch dimension of 1, XLA's CPU backend keeps its bfloat16 library, which has
    # no product of two transposed matrices.
    if x.ndim == 2:
        x, g = x[None], g[None]
    factors = (g, x) if transposed else (x, g)
    dkernel = _einsum("btf,btd->fd" if transposed else "btd,btf->df", *factors)
    return dx.astype(like_x.dtype), dkernel


matmul.defvjp(matmul_forward, matmul_backward)
