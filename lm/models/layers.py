"""The parts of a Transformer that hold parameters: linear maps, norms, embeddings, feed-forward.

Shape letters: B batch, L query length, D model, F feed-forward, V vocabulary.
Parameters are float32 and carry the logical axis names of `parallel/sharding.py`.
"""

from __future__ import annotations

from math import prod
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.kernels.dense import ACTIVATIONS, GATED, add_bias, matmul
from lm.models.init_config import InitConfig, Initializer
from lm.models.transformer_config import TransformerConfig
from lm.parallel.sharding import constrain, count_shards, embedding_lookup


def named(init: Initializer, names: tuple[str, ...]) -> Any:
    """An initializer whose result carries the logical names of its axes."""
    return nn.with_partitioning(init, names)


def tokens_of(leading: tuple[int, ...]) -> tuple[int, ...]:
    """The leading dimensions of what a linear map is applied to: one, of all tokens.

    Flat is what the backward pass multiplies fastest. A length that is cut over the mesh stays a
    dimension of its own: joined with the rows it would have to be gathered first.
    """
    cut = len(leading) == 2 and count_shards("residual_length") > 1
    return leading if cut else (prod(leading),)


class Linear(nn.Module):
    """A linear map of the last `len(in_shape)` dimensions to `out_shape`.

    The kernel is [*in_shape, *out_shape]. It is applied as one product of two matrices, tokens
    flattened by `tokens_of`; sums are in float32.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    names: tuple[str, ...]
    use_bias: bool
    kernel_init: Initializer
    dtype: jnp.dtype
    out_dtype: jnp.dtype | None = None
    bias_init: Initializer = nn.initializers.zeros

    def setup(self) -> None:
        shape = (*self.in_shape, *self.out_shape)
        self.kernel = self.param("kernel", named(self.kernel_init, self.names), shape, jnp.float32)
        if self.use_bias:
            init = named(self.bias_init, self.names[len(self.in_shape) :])
            self.bias = self.param("bias", init, self.out_shape, jnp.float32)

    def __call__(self, x: jax.Array) -> jax.Array:
        leading = x.shape[: x.ndim - len(self.in_shape)]
        y = matmul(
            x.reshape(*tokens_of(leading), prod(self.in_shape)),
            self.kernel.reshape(prod(self.in_shape), prod(self.out_shape)),
            self.dtype,
        )
        if self.use_bias:
            y = add_bias(y, self.bias.reshape(-1))
        return y.astype(self.out_dtype or self.dtype).reshape(*leading, *self.out_shape)


def init_linear(
    config: InitConfig,
    n_in: int,
    out_shape: tuple[int, ...],
    names: tuple[str, ...],
    use_bias: bool = True,
    bias_init: Initializer = nn.initializers.zeros,
    name: str | None = None,
) -> Linear:
    """A map of vectors to float32 that starts as its model's configuration says."""
    c = config
    return Linear(
        (n_in,),
        out_shape,
        names,
        use_bias,
        c.kernel_init(c.stddev(n_in, out_shape[-1])),
        c.dtype,
        out_dtype=jnp.float32,
        bias_init=c.bias_init(bias_init),
        name=name,
    )


class Bias(nn.Module):
    """One number for each entry of the vocabulary: an output layer's whose matrix is a table."""

    size: int
    bias_init: Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, logits_BLV: jax.Array) -> jax.Array:
        bias_V = self.param("bias", named(self.bias_init, ("vocab",)), (self.size,), jnp.float32)
        return add_bias(logits_BLV, bias_V)


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019), computed in float32.

    With `unit_offset` it multiplies by 1 + scale, so that decay pulls towards 1 (Gemma).
    """

    kind: str
    eps: float
    use_bias: bool
    unit_offset: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        width = x_BLD.shape[-1:]
        start = nn.initializers.zeros if self.unit_offset else nn.initializers.ones
        scale_D = self.param("scale", named(start, ("norm",)), width, jnp.float32)
        x_BLD = x_BLD.astype(jnp.float32)
        if self.kind == "layernorm":
            x_BLD -= x_BLD.mean(-1, keepdims=True)
        y_BLD = x_BLD * jax.lax.rsqrt(jnp.square(x_BLD).mean(-1, keepdims=True) + self.eps)
        y_BLD *= 1 + scale_D if self.unit_offset else scale_D
        if self.kind == "layernorm" and self.use_bias:
            zeros = named(nn.initializers.zeros, ("norm",))
            y_BLD += self.param("bias", zeros, width, jnp.float32)
        return y_BLD.astype(self.dtype)


def make_norm(config: TransformerConfig, name: str | None = None) -> Norm:
    """The normalisation that a model uses everywhere."""
    c = config
    return Norm(c.norm, c.norm_eps, c.norm_bias, c.norm_unit_offset, c.dtype, name=name)


class Embedding(nn.Module):
    """A table of rows, looked up by id; `attend` is the tied output projection."""

    rows: int
    width: int
    row_name: str
    table_init: Initializer
    dtype: jnp.dtype

    def setup(self) -> None:
        init = named(self.table_init, (self.row_name, "embed"))
        self.embedding = self.param("embedding", init, (self.rows, self.width), jnp.float32)

    def __call__(self, ids_BL: jax.Array) -> jax.Array:
        return embedding_lookup(self.embedding.astype(self.dtype), (self.row_name, "embed"), ids_BL)

    def first(self, length: int) -> jax.Array:
        """Rows 0 … length - 1, as a slice: its gradient is no scatter."""
        return self.embedding[:length].astype(self.dtype)

    def attend(self, x_BLD: jax.Array) -> jax.Array:
        """Logits [B, L, rows], float32."""
        leading = tokens_of(x_BLD.shape[:-1])
        logits = matmul(x_BLD.reshape(*leading, self.width), self.embedding, self.dtype, True)
        return logits.reshape(*x_BLD.shape[:-1], self.rows)


class FeedForward(nn.Module):
    """act(x W_in) W_out, or, gated, (act(x W_gate) * x W_in) W_out (Shazeer 2020)."""

    config: TransformerConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        c, width = self.config, x_BLD.shape[-1]

        def wide(name: str) -> jax.Array:
            init, names = c.kernel_init(c.std(width, c.d_ff)), ("embed", "mlp")
            linear = Linear((width,), (c.d_ff,), names, c.bias, init, c.dtype, name=name)
            return constrain(linear(x_BLD), "batch", "length", "mlp")

        act = ACTIVATIONS[c.activation]
        h_BLF = act(wide("gate")) * wide("in") if c.activation in GATED else act(wide("in"))
        h_BLF = nn.Dropout(c.activation_dropout, deterministic=self.deterministic)(h_BLF)
        init, names = c.kernel_init(c.residual_std(c.d_ff, c.d_model)), ("mlp", "embed")
        return Linear((c.d_ff,), (c.d_model,), names, c.bias, init, c.dtype, name="out")(h_BLF)
