"""The parts of a Transformer that hold parameters: linear maps, norms, embeddings, feed-forward.

Shape letters: B batch, L query length, D model, F feed-forward, V vocabulary.
Parameters are float32 and carry the logical axis names of `parallel/rules.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.kernels.activations import ACTIVATIONS, GATED
from lm.parallel.rules import constrain

Initializer = Callable[..., jax.Array]


def named(init: Initializer, names: tuple[str, ...]) -> Any:
    """An initializer whose result carries the logical names of its axes."""
    return nn.with_partitioning(init, names)


class Linear(nn.Module):
    """A linear map of the last `len(in_shape)` dimensions to `out_shape`.

    The kernel is [*in_shape, *out_shape]. It is applied as one product of two matrices, tokens
    flattened, because that is what the backward pass multiplies fastest; sums are in float32.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    names: tuple[str, ...]
    use_bias: bool
    std: float
    dtype: jnp.dtype
    out_dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*self.in_shape, *self.out_shape)
        kernel = self.param(
            "kernel", named(nn.initializers.normal(self.std), self.names), shape, jnp.float32
        )
        leading = x.shape[: x.ndim - len(self.in_shape)]
        y = jnp.matmul(
            x.astype(self.dtype).reshape(prod(leading), prod(self.in_shape)),
            kernel.astype(self.dtype).reshape(prod(self.in_shape), prod(self.out_shape)),
            preferred_element_type=jnp.float32,
        )
        if self.use_bias:
            names = self.names[len(self.in_shape) :]
            zeros = named(nn.initializers.zeros, names)
            y += self.param("bias", zeros, self.out_shape, jnp.float32).reshape(-1)
        return y.astype(self.out_dtype or self.dtype).reshape(*leading, *self.out_shape)


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019), computed in float32."""

    kind: str
    eps: float
    use_bias: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        width = x_BLD.shape[-1:]
        ones = named(nn.initializers.ones, ("norm",))
        scale_D = self.param("scale", ones, width, jnp.float32)
        x_BLD = x_BLD.astype(jnp.float32)
        if self.kind == "layernorm":
            x_BLD -= x_BLD.mean(-1, keepdims=True)
        y_BLD = x_BLD * jax.lax.rsqrt(jnp.square(x_BLD).mean(-1, keepdims=True) + self.eps)
        y_BLD *= scale_D
        if self.kind == "layernorm" and self.use_bias:
            zeros = named(nn.initializers.zeros, ("norm",))
            y_BLD += self.param("bias", zeros, width, jnp.float32)
        return y_BLD.astype(self.dtype)


class Embedding(nn.Module):
    """A table of rows, looked up by id; `attend` is the tied output projection."""

    rows: int
    width: int
    row_name: str
    std: float
    dtype: jnp.dtype

    def setup(self) -> None:
        init = named(nn.initializers.normal(self.std), (self.row_name, "embed"))
        self.embedding = self.param("embedding", init, (self.rows, self.width), jnp.float32)

    def __call__(self, ids_BL: jax.Array) -> jax.Array:
        # A row is looked up whole: a width sharded like the parameter would be reshuffled after.
        table = constrain(self.embedding.astype(self.dtype), self.row_name, "embed")
        return jnp.take(table, ids_BL, axis=0)

    def first(self, length: int) -> jax.Array:
        """Rows 0 … length - 1, as a slice: its gradient is no scatter."""
        return self.embedding[:length].astype(self.dtype)

    def attend(self, x_BLD: jax.Array) -> jax.Array:
        """Logits [B, L, rows], float32."""
        B, L, D = x_BLD.shape
        logits = jnp.matmul(
            x_BLD.reshape(B * L, D),
            self.embedding.astype(self.dtype).T,
            preferred_element_type=jnp.float32,
        )
        return logits.reshape(B, L, self.rows)


class FeedForward(nn.Module):
    """act(x W_in) W_out, or, gated, (act(x W_gate) * x W_in) W_out (Shazeer 2020)."""

    d_model: int
    d_ff: int
    activation: str
    use_bias: bool
    std: float
    residual_std: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        def wide(name: str) -> jax.Array:
            linear = Linear(
                (self.d_model,),
                (self.d_ff,),
                ("embed", "mlp"),
                self.use_bias,
                self.std,
                self.dtype,
                name=name,
            )
            return constrain(linear(x_BLD), "batch", "length", "mlp")

        act = ACTIVATIONS[self.activation]
        h_BLF = act(wide("gate")) * wide("in") if self.activation in GATED else act(wide("in"))
        out = Linear(
            (self.d_ff,),
            (self.d_model,),
            ("mlp", "embed"),
            self.use_bias,
            self.residual_std,
            self.dtype,
            name="out",
        )
        return out(h_BLF)
