"""Dense layers: product, bias and activation, with backward passes of their own.

Shape letters: T tokens, D inputs, F outputs; other leading dimensions may come before T.
"""

from __future__ import annotations

from collections.abc import Callable
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


@jax.custom_vjp
def add_bias(x: jax.Array, bias_F: jax.Array) -> jax.Array:
    """Add a bias [F] to x [..., F].

    On a CPU the bias gradient is computed as a product with ones: XLA's column sums are so slow
    there that with a vocabulary of 33,000 they took a fifth of the time of the loss.
    """
    return x + bias_F


def _add_bias_forward(x: jax.Array, bias_F: jax.Array) -> tuple[jax.Array, None]:
    return x + bias_F, None


def _add_bias_backward(_: None, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    def product_with_ones(g: jax.Array) -> jax.Array:
        return jnp.tensordot(jnp.ones(g.shape[:-1]), g, g.ndim - 1, precision="highest")

    def column_sums(g: jax.Array) -> jax.Array:
        return g.sum(range(g.ndim - 1))

    return g, jax.lax.platform_dependent(g, cpu=product_with_ones, default=column_sums)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


@jax.custom_vjp
def gelu_erf(x: jax.Array) -> jax.Array:
    """Return x Φ(x) with the normal distribution function Φ (Hendrycks and Gimpel 2016).

    Accurate to float32. `erf` is slow on CPUs, so Φ comes from one exponential that the derivative
    Φ(x) + x φ(x) shares (Abramowitz and Stegun 1964, 7.1.26: |error| ≤ 1.5e-7).
    """
    return (x * _normal(x.astype(jnp.float32))[0]).astype(x.dtype)


def _gelu_erf_backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    x = jax.lax.optimization_barrier(x)
    cdf, density = _normal(x.astype(jnp.float32))
    return ((dy * (cdf + x * density)).astype(x.dtype),)


gelu_erf.defvjp(lambda x: (gelu_erf(x), x), _gelu_erf_backward)


def _normal(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the distribution function and the density of the standard normal distribution."""
    bell = jnp.exp(-0.5 * x * x)
    t = 1 / (1 + 0.3275911 * 0.5**0.5 * jnp.abs(x))
    series = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
    tail = 0.5 * bell * t * jnp.polyval(jnp.asarray(series[::-1], x.dtype), t)
    return jnp.where(x < 0, tail, 1 - tail), bell * (2 * jnp.pi) ** -0.5


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "gelu_erf": gelu_erf,
    "swiglu": jax.nn.silu,
    "geglu": partial(jax.nn.gelu, approximate=True),
}
GATED = ("swiglu", "geglu")  # gated linear units (Shazeer 2020)


def softcap(x: jax.Array, cap: float) -> jax.Array:
    """Return cap · tanh(x / cap), which stays within ±cap (Gemma 2, §2)."""
    return cap * jnp.tanh(x / cap)
