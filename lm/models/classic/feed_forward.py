"""Word-window models: the neural probabilistic language model, and skip-gram.

Shape letters: B batch, L length or centres, S contexts, W words of context, D embedding, H hidden
units, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from lm.models.classic.linear import init_linear
from lm.models.layers import Embedding
from lm.models.transformer_config import InitConfig
from lm.models.variables import Kind, Role
from lm.parallel.mesh import constrain


@dataclass(frozen=True)
class NplmConfig(InitConfig):
    """Neural probabilistic language model; fields are documented in `lm/config/keys.py`."""

    d_model: int
    d_hidden: int
    vocab_size: int
    context: int = 4
    direct: bool = False
    dropout: float = 0.0
    loss_chunk: int = 0


@flax.struct.dataclass
class Window:
    """Last W - 1 tokens of every row and their segments, 0 before the first token."""

    tokens_BW: jax.Array
    segments_BW: jax.Array

    def take(self, rows: jax.Array) -> Window:
        """Return a window whose row i is row `rows[i]` of this one, as beam search needs."""
        return jax.tree.map(lambda x: jnp.take(x, rows, axis=0), self)


class Nplm(nn.Module):
    """Neural probabilistic language model: y = b + W x + U tanh(d + H x).

    Bengio et al. 2003, eq. 1. x are the embeddings of the last words, 0 before the start of the
    text. The direct connections W exist with `config.direct` only.
    """

    config: NplmConfig
    deterministic: bool = True

    def setup(self) -> None:
        c = self.config
        n_inputs = c.context * c.d_model
        tokens = Role(Kind.EMBEDDING, c.stream, "input")
        hidden = Role(Kind.MATRIX, c.stream, "body")
        # It has most of the model's parameters, so they are counted with the layers.
        scores = Role(Kind.HEAD, "predicted", "body")
        V, n_hidden = (c.vocab_size,), (c.d_hidden,)
        self.tokens = Embedding(c.vocab_size, c.d_model, "vocab", tokens, c.table_init, c.dtype)
        self.hidden_layer = init_linear(c, n_inputs, n_hidden, ("embed", "hidden"), hidden)
        self.head = init_linear(c, c.d_hidden, V, ("hidden", "vocab"), scores)
        self.direct = init_linear(c, n_inputs, V, ("embed", "vocab"), scores, use_bias=False)
        self.dropout = nn.Dropout(c.dropout, deterministic=self.deterministic)

    def __call__(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array | None = None,
        segment_ids_BL: jax.Array | None = None,
    ) -> jax.Array:
        """Return logits [B, L, V], float32, from each token and W - 1 before it in its segment."""
        return self.logits(self.hidden(tokens_BL, positions_BL, segment_ids_BL))

    def hidden(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array | None = None,
        segment_ids_BL: jax.Array | None = None,
    ) -> jax.Array:
        """Return the concatenated embeddings of the context words, [B, L, W·D]."""
        segment_ids_BL = jnp.ones_like(tokens_BL) if segment_ids_BL is None else segment_ids_BL
        return self._context(tokens_BL, segment_ids_BL, self.empty_cache(*tokens_BL.shape))[0]

    def logits(self, x_BLE: jax.Array) -> jax.Array:
        """Return the logits of the vocabulary [B, L, V], float32."""
        logits_BLV = self.head(self.dropout(jnp.tanh(self.hidden_layer(x_BLE))))
        if self.config.direct:
            logits_BLV += self.direct(x_BLE)
        return constrain(logits_BLV, "batch", "length", "vocab")

    def decode(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array | None,
        segment_ids_BL: jax.Array,
        cache: Window,
    ) -> tuple[jax.Array, Window]:
        """Return logits [B, L, V] of tokens after those in the cache, and the cache with them."""
        x_BLE, cache = self._context(tokens_BL, segment_ids_BL, cache)
        return self.logits(x_BLE), cache

    def _context(
        self, tokens_BL: jax.Array, segment_ids_BL: jax.Array, cache: Window
    ) -> tuple[jax.Array, Window]:
        c, L = self.config, tokens_BL.shape[1]
        tokens = jnp.concatenate([cache.tokens_BW, tokens_BL], axis=1)
        segments = jnp.concatenate([cache.segments_BW, segment_ids_BL], axis=1)
        rows = self.dropout(self.tokens(tokens))
        words = [
            jnp.where((segments[:, i : i + L] == segment_ids_BL)[..., None], rows[:, i : i + L], 0)
            for i in range(c.context)
        ]
        x_BLE = constrain(jnp.concatenate(words, axis=-1), "batch", "length", "embed")
        return x_BLE, Window(tokens[:, L:], segments[:, L:])

    def empty_cache(self, batch: int, length: int) -> Window:
        """Return the window before the first token; any `length` fits."""
        shape = (batch, self.config.context - 1)
        return Window(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.int32))


@dataclass(frozen=True)
class SkipGramConfig(InitConfig):
    """Skip-gram model; fields are documented in `lm/config/keys.py`."""

    vocab_size: int
    d_model: int


class SkipGramModel(nn.Module):
    """Skip-gram model (Mikolov et al. 2013a, 2013b): each word has a centre and a context vector.

    After training the word vectors are the centre table. `deterministic` has no effect.
    """

    config: SkipGramConfig
    deterministic: bool = True

    def setup(self) -> None:
        c = self.config
        role = Role(Kind.EMBEDDING, c.stream, "input")
        self.tokens = Embedding(c.vocab_size, c.d_model, "vocab", role, c.table_init, c.dtype)
        # Zero, as in word2vec's code: at first every pair has probability 0.5.
        zeros, role = nn.initializers.zeros, replace(role, part="output")
        self.contexts = Embedding(c.vocab_size, c.d_model, "vocab", role, zeros, c.dtype)

    def __call__(self, centres_BL: jax.Array, contexts_BS: jax.Array) -> jax.Array:
        """Return the dot products of all centres with all contexts, [B, L, S] float32."""
        centres_BLD = constrain(self.tokens(centres_BL), "batch", "length", "embed")
        contexts_BSD = constrain(self.contexts(contexts_BS), "batch", "length", "embed")
        return jnp.einsum(
            "bld,bsd->bls", centres_BLD, contexts_BSD, preferred_element_type=jnp.float32
        )
