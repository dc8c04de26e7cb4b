"""Element-wise functions: activations by configuration name, soft caps, biases.

Shape letters: F outputs; any leading dimensions may come before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp


@jax.custom_vjp
def gelu_erf(x: jax.Array) -> jax.Array:
    """Return x Φ(x) with the normal distribution function Φ (Hendrycks and Gimpel 2016).

    Accurate to float32. `erf` is slow on CPUs, so Φ is computed from one exponential that the
    derivative Φ(x) + x φ(x) shares (Abramowitz and Stegun 1964, 7.1.26: |error| ≤ 1.5e-7).
    """
    return (x * _normal(x.astype(jnp.float32))[0]).astype(x.dtype)


def _gelu_erf_backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    x = jax.lax.optimization_barrier(x)
    cdf, density = _normal(x.astype(jnp.float32))
    return ((dy * (cdf + x * density)).astype(x.dtype),)


gelu_erf.defvjp(lambda x: (gelu_erf(x), x), _gelu_erf_backward)


def _normal(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return cumulative distribution function and density of the standard normal distribution."""
    bell = jnp.exp(-0.5 * x * x)
    t = 1 / (1 + 0.3275911 * 0.5**0.5 * jnp.abs(x))
    series = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
    tail = 0.5 * bell * t * jnp.polyval(jnp.asarray(series[::-1], x.dtype), t)
    return jnp.where(x < 0, tail, 1 - tail), bell * (2 * jnp.pi) ** -0.5


def _clipped_silu(x: jax.Array) -> jax.Array:
    """Return x σ(1.702 x) with x clipped at 7 (gpt-oss's released code)."""
    x = jnp.minimum(x, 7)
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "gelu_erf": gelu_erf,
    "silu": jax.nn.silu,
    "reglu": jax.nn.relu,
    "swiglu": jax.nn.silu,
    "geglu": partial(jax.nn.gelu, approximate=True),
    "geglu_erf": gelu_erf,
    "swiglu_clipped": _clipped_silu,
}
# Function of the other projection that gated linear units multiply by (Shazeer 2020).
GATED: dict[str, Callable[[jax.Array], jax.Array]] = {
    "reglu": jnp.positive,
    "swiglu": jnp.positive,
    "geglu": jnp.positive,
    "geglu_erf": jnp.positive,
    "swiglu_clipped": lambda x: jnp.clip(x, -7, 7) + 1,
}
_UNGATED = dict.fromkeys(GATED, "gelu_tanh") | {"geglu_erf": "gelu_erf", "reglu": "relu"}


def output_activation(name: str, of_layers: str) -> str:
    """Return the activation before an output layer: `name`, or the layers' one for "family"."""
    return _UNGATED.get(of_layers, of_layers) if name == "family" else name


def softcap(x: jax.Array, cap: float) -> jax.Array:
    """Return cap · tanh(x / cap), which stays within ±cap (Gemma 2, §2)."""
    return cap * jnp.tanh(x / cap)


@jax.custom_vjp
def add_bias(x: jax.Array, bias_F: jax.Array) -> jax.Array:
    """Add a bias [F] to x [..., F].

    On CPU the bias gradient is computed as a product with ones: XLA's column sums are so slow
    there that with a vocabulary of 33,000 they took a fifth of the loss's time.
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
