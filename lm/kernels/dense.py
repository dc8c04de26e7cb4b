"""Products of linear maps, with a backward pass of their own.

Shape letters: T tokens, D inputs, F outputs; other leading dimensions may come before T.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

_einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(
    x_TD: jax.Array, kernel: jax.Array, dtype: jnp.dtype, transposed: bool = False
) -> jax.Array:
    """Multiply by a kernel in the compute dtype, accumulating in float32.

    JAX's own backward pass would multiply a float32 gradient by a bfloat16 kernel, which no matrix
    unit does. Here the gradient is rounded like the operands; the kernel's gradient is float32.

    Args:
        x_TD: activations [..., T, D].
        kernel: float32 [D, F], or [F, D] if `transposed`.
        dtype: compute dtype that both operands are rounded to.
        transposed: whether the kernel is stored as [F, D].

    Returns:
        The product, [..., T, F] float32.
    """
    return _matmul_forward(x_TD, kernel, dtype, transposed)[0]


def _matmul_forward(
    x_TD: jax.Array, kernel: jax.Array, dtype: jnp.dtype, transposed: bool
) -> tuple:
    kernel_axes = "fd" if transposed else "df"
    x, kernel = x_TD.astype(dtype), kernel.astype(dtype)
    # An empty array carries the dtype that the gradient of x must have.
    like_x = jnp.zeros((0,), x_TD.dtype)
    return _einsum(f"...d,{kernel_axes}->...f", x, kernel), (x, kernel, like_x)


def _matmul_backward(
    dtype: jnp.dtype, transposed: bool, residuals: tuple, g_TF: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel, like_x = residuals
    g = g_TF.astype(dtype)
    kernel_axes = "fd" if transposed else "df"
    dx = _einsum(f"...f,{kernel_axes}->...d", g, kernel)
    # With a leading batch dimension of 1, XLA's CPU backend keeps its bfloat16 library, which has
    # no product of two transposed matrices.
    if x.ndim == 2:
        x, g = x[None], g[None]
    factors = (g, x) if transposed else (x, g)
    dkernel = _einsum("btf,btd->fd" if transposed else "btd,btf->df", *factors)
    return dx.astype(like_x.dtype), dkernel


matmul.defvjp(_matmul_forward, _matmul_backward)
