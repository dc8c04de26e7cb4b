"""The LSTM as a language model and as a classifier.

Shape letters: B batch, L length, D embedding, H hidden units, N layers, V vocabulary, C classes.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.models.classic.lstm import LstmCache, RecurrentConfig, Stack, last
from lm.models.layers import Bias, Embedding, init_linear
from lm.models.variables import Kind, Role
from lm.parallel.sharding import constrain


class Recurrent(nn.Module):
    """What recurrent models have in common: a token table and an output layer.

    Where they share their matrix, hidden units of another number than d_model are projected first.
    """

    config: RecurrentConfig
    deterministic: bool = True

    def setup(self) -> None:
        c = self.config
        tokens = Role(Kind.EMBEDDING, "predicted", "input", tied=c.tie_embeddings)
        self.tokens = Embedding(c.vocab_size, c.d_model, "vocab", tokens, c.table_init, c.dtype)
        self.dropout = nn.Dropout(c.dropout, deterministic=self.deterministic)
        hidden = Role(Kind.MATRIX, c.stream, "body")
        head = Role(Kind.HEAD, "predicted", "output")
        self.projection = init_linear(
            c, c.d_hidden, (c.d_model,), ("hidden", "embed"), hidden, use_bias=False
        )
        self.bias = Bias(c.vocab_size, Role(Kind.BIAS, c.stream, "body"), c.bias_init())
        self.head = init_linear(c, c.d_hidden, (c.vocab_size,), ("hidden", "vocab"), head)

    def logits(self, x_BLH: jax.Array) -> jax.Array:
        """Scores of the vocabulary [B, L, V], float32."""
        c = self.config
        x_BLH = self.dropout(x_BLH)
        if c.tie_embeddings:
            x_BLD = x_BLH if c.d_hidden == c.d_model else self.projection(x_BLH)
            logits_BLV = self.bias(self.tokens.attend(x_BLD))
        else:
            logits_BLV = self.head(x_BLH)
        return constrain(logits_BLV, "batch", "length", "vocab")


class Lstm(Recurrent):
    """Next-token logits (Zaremba et al. 2014), or classes of texts."""

    def setup(self) -> None:
        super().setup()
        c = self.config
        self.stack = Stack(c, self.deterministic, c.bidirectional)
        self.carried = Carried((c.n_layers, 2, c.d_hidden))
        role = Role(Kind.HEAD, "text", "task")
        self.classifier = init_linear(c, c.d_hidden, (c.n_classes,), ("hidden", "classes"), role)

    def __call__(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array | None = None,
        segment_ids_BL: jax.Array | None = None,
        fresh_B: jax.Array | None = None,
    ) -> jax.Array:
        """Logits [B, L, V], float32; a token sees those before it in its segment."""
        return self.logits(self.hidden(tokens_BL, positions_BL, segment_ids_BL, fresh_B=fresh_B))

    def hidden(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array | None = None,
        segment_ids_BL: jax.Array | None = None,
        types_BL: jax.Array | None = None,
        fresh_B: jax.Array | None = None,
    ) -> jax.Array:
        """The last layer's outputs, [B, L, H]; positions and types are of no use to it.

        With config.carry the first tokens go on from the end of the batch before, in its
        collection "carry", except in rows that are `fresh`.
        """
        if not self.config.carry:
            return self.stack(self.tokens(tokens_BL), segment_ids_BL)[0]
        carried = self.carried(len(tokens_BL))
        fresh_B = jnp.zeros(len(tokens_BL)) if fresh_B is None else fresh_B
        state_BN2H = jnp.where(fresh_B[:, None, None, None] == 1, 0.0, carried.value)
        segment_ids_BL = jnp.ones_like(tokens_BL) if segment_ids_BL is None else segment_ids_BL
        memory = LstmCache(state_BN2H, segment_ids_BL[:, 0])
        x_BLH, states = self.stack(self.tokens(tokens_BL), segment_ids_BL, memory)
        carried.value = last(states)
        return x_BLH

    def pooled(self, x_BLH: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
        """The vector [B, H] of a text: each unit's maximum over it (Conneau 2017, §3.2.2)."""
        # No unit is below -1, so padding never counts.
        return jnp.where(segment_ids_BL[..., None] != 0, x_BLH, -1).max(axis=1)

    def classify(self, x_BH: jax.Array) -> jax.Array:
        """Scores of the classes [B, C], float32, of what `pooled` gives."""
        return self.classifier(self.dropout(x_BH))

    def decode(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array,
        segment_ids_BL: jax.Array,
        cache: LstmCache,
    ) -> tuple[jax.Array, LstmCache]:
        """Logits [B, L, V] of tokens that follow those in the cache, and the cache with them."""
        x_BLH, states = self.stack(self.tokens(tokens_BL), segment_ids_BL, cache)
        return self.logits(x_BLH), LstmCache(last(states), segment_ids_BL[:, -1])

    def empty_cache(self, batch: int, length: int) -> LstmCache:
        """The state before the first token; any `length` fits in it."""
        c = self.config
        shape = (batch, c.n_layers, 2, c.d_hidden)
        return LstmCache(jnp.zeros(shape, jnp.float32), jnp.zeros(batch, jnp.int32))


class Carried(nn.Module):
    """The state [B, N, 2, H] that the last batch left."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, batch: int) -> nn.Variable:
        return self.variable("carry", "state", jnp.zeros, (batch, *self.shape), jnp.float32)
