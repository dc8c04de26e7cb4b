"""The product behind every linear map, with a backward pass that stays in the compute type.

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
    """x times a float32 kernel, both rounded to `dtype`, summed in float32: […, T, F] float32.

    The kernel is [D, F], or [F, D] if `transposed`. JAX's own backward pass would multiply a
    float32 gradient by a bfloat16 kernel, which no matrix unit does; here the gradient is rounded
    like the operands, and the kernel's gradient is never less than float32.
    """
    return _forward(x_TD, kernel, dtype, transposed)[0]


def _forward(x_TD: jax.Array, kernel: jax.Array, dtype: jnp.dtype, transposed: bool) -> tuple:
    of_kernel = "fd" if transposed else "df"
    x, kernel = x_TD.astype(dtype), kernel.astype(dtype)
    # An empty array carries the type that the gradient of x must have.
    return _einsum(f"...d,{of_kernel}->...f", x, kernel), (x, kernel, jnp.zeros((0,), x_TD.dtype))


def _backward(
    dtype: jnp.dtype, transposed: bool, saved: tuple, g_TF: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel, of_x = saved
    g = g_TF.astype(dtype)
    of_kernel = "fd" if transposed else "df"
    dx = _einsum(f"...f,{of_kernel}->...d", g, kernel)
    # A leading 1 of the kernel's gradient keeps the CPU's bfloat16 library, which knows no
    # product of two transposed matrices.
    if x.ndim == 2:
        x, g = x[None], g[None]
    factors = (g, x) if transposed else (x, g)
    dkernel = _einsum("btf,btd->fd" if transposed else "btd,btf->df", *factors)
    return dx.astype(of_x.dtype), dkernel


matmul.defvjp(_forward, _backward)
