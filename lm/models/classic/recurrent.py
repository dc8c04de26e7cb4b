"""LSTM models: language model and classifier, and encoder-decoder with attention.

Shape letters: B batch, L length, S source length, D embedding, H hidden units, N layers,
V vocabulary, C classes.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.kernels.dot_product_attention import AttentionMask, attention
from lm.kernels.lstm_scan import LstmState
from lm.models.classic.linear import init_linear
from lm.models.classic.lstm import (
    LstmCache,
    LstmStack,
    RecurrentConfig,
    last_states,
    segment_starts,
)
from lm.models.copying import CopyState, EncodedSource, attend_to_source, mixed_logits
from lm.models.layers import Embedding
from lm.models.task_layers import Bias
from lm.models.variables import Kind, Role
from lm.parallel.mesh import constrain


class Recurrent(nn.Module):
    """Base class of the recurrent models: token embeddings and an output layer.

    With tied embeddings, hidden states whose width is not d_model are projected to it.
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
        """Return the logits of the vocabulary [B, L, V], float32."""
        c = self.config
        x_BLH = self.dropout(x_BLH)
        if c.tie_embeddings:
            x_BLD = x_BLH if c.d_hidden == c.d_model else self.projection(x_BLH)
            logits_BLV = self.bias(self.tokens.attend(x_BLD))
        else:
            logits_BLV = self.head(x_BLH)
        return constrain(logits_BLV, "batch", "length", "vocab")


class Lstm(Recurrent):
    """LSTM language model (Zaremba et al. 2014), or text classifier."""

    def setup(self) -> None:
        super().setup()
        c = self.config
        self.stack = LstmStack(c, self.deterministic, c.bidirectional)
        self.carried = CarriedState((c.n_layers, 2, c.d_hidden))
        role = Role(Kind.HEAD, "text", "task")
        self.classifier = init_linear(c, c.d_hidden, (c.n_classes,), ("hidden", "classes"), role)

    def __call__(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array | None = None,
        segment_ids_BL: jax.Array | None = None,
        fresh_B: jax.Array | None = None,
    ) -> jax.Array:
        """Return the logits [B, L, V] of the next tokens, float32; arguments as for `hidden`."""
        return self.logits(self.hidden(tokens_BL, positions_BL, segment_ids_BL, fresh_B=fresh_B))

    def hidden(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array | None = None,
        segment_ids_BL: jax.Array | None = None,
        types_BL: jax.Array | None = None,
        fresh_B: jax.Array | None = None,
    ) -> jax.Array:
        """Return the outputs of the last layer, [B, L, H].

        With `config.carry` and a mutable collection "carry", the first tokens continue from the end
        of the previous batch, stored in it.

        Args:
            tokens_BL: token ids.
            positions_BL: ignored.
            segment_ids_BL: segments; default: one per row.
            types_BL: ignored.
            fresh_B: 1 for rows that start from state 0 instead.
        """
        if not (self.config.carry and self.is_mutable_collection("carry")):
            return self.stack(self.tokens(tokens_BL), segment_ids_BL)[0]
        carried = self.carried(len(tokens_BL))
        fresh_B = jnp.zeros(len(tokens_BL)) if fresh_B is None else fresh_B
        state_BN2H = jnp.where(fresh_B[:, None, None, None] == 1, 0.0, carried.value)
        segment_ids_BL = jnp.ones_like(tokens_BL) if segment_ids_BL is None else segment_ids_BL
        cache = LstmCache(state_BN2H, segment_ids_BL[:, 0])
        x_BLH, states = self.stack(self.tokens(tokens_BL), segment_ids_BL, cache)
        carried.value = last_states(states)
        return x_BLH

    def pooled(self, x_BLH: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
        """Return the max-pooled embedding [B, H] of a text (Conneau 2017, §3.2.2)."""
        # No unit is below -1, so padding never counts.
        return jnp.where(segment_ids_BL[..., None] != 0, x_BLH, -1).max(axis=1)

    def classify(self, x_BH: jax.Array) -> jax.Array:
        """Return class logits [B, C], float32, from the result of `pooled`."""
        return self.classifier(self.dropout(x_BH))

    def decode(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array,
        segment_ids_BL: jax.Array,
        cache: LstmCache,
    ) -> tuple[jax.Array, LstmCache]:
        """Return logits [B, L, V] of tokens after those in the cache, and the cache with them."""
        x_BLH, states = self.stack(self.tokens(tokens_BL), segment_ids_BL, cache)
        return self.logits(x_BLH), LstmCache(last_states(states), segment_ids_BL[:, -1])

    def empty_cache(self, batch: int, length: int) -> LstmCache:
        """Return the state before the first token; any `length` fits."""
        c = self.config
        shape = (batch, c.n_layers, 2, c.d_hidden)
        return LstmCache(jnp.zeros(shape, jnp.float32), jnp.zeros(batch, jnp.int32))


class CarriedState(nn.Module):
    """State [B, N, 2, H] at the end of the previous batch."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, batch: int) -> nn.Variable:
        return self.variable("carry", "state", jnp.zeros, (batch, *self.shape), jnp.float32)


class LstmEncoderDecoder(Recurrent):
    """LSTM encoder-decoder with attention (Luong et al. 2015, simplified by Dong and Lapata 2016).

    Each layer of the decoder starts from the final state of that layer of the encoder. The
    decoder's outputs h attend to the encoder's by dot products, and logits are computed from
    tanh(W [h; context]). The context is not part of the next input, so that in training attention
    is computed for all steps at once. With `config.bidirectional` the encoder reads both ways; with
    `config.copy` hidden states are a `CopyState` (`lm/models/copying.py`).
    """

    def setup(self) -> None:
        super().setup()
        c = self.config
        self.encoder = LstmStack(replace(c, stream="source"), self.deterministic, c.bidirectional)
        self.decoder = LstmStack(c, self.deterministic)
        role, n_hidden = Role(Kind.MATRIX, c.stream, "body"), (c.d_hidden,)
        self.attended = init_linear(c, 2 * c.d_hidden, n_hidden, ("hidden", "hidden"), role)
        self.copy_query = init_linear(
            c, c.d_hidden, n_hidden, ("hidden", "hidden"), role, use_bias=False
        )
        head = Role(Kind.HEAD, c.stream, "body")
        self.copy_gate = init_linear(c, c.d_hidden, (1,), ("hidden", "classes"), head)

    def logits(self, x_BLH: jax.Array | CopyState) -> jax.Array:
        """Return the logits [B, L, V] of hidden states or of a `CopyState`, float32."""
        return mixed_logits(super().logits, x_BLH)

    def __call__(self, *inputs: jax.Array) -> jax.Array:
        """Return the next-target logits [B, L, V], float32; inputs as for `decoder_hidden`."""
        return self.logits(self.decoder_hidden(*inputs))

    def decoder_hidden(
        self,
        source_BS: jax.Array,
        targets_BL: jax.Array,
        source_segments_BS: jax.Array | None = None,
        target_segments_BL: jax.Array | None = None,
        source_positions_BS: jax.Array | None = None,
        target_positions_BL: jax.Array | None = None,
    ) -> jax.Array | CopyState:
        """Return the hidden states that the logits are computed from, [B, L, H].

        A target attends to the sources and earlier targets of its segment; segment 0 is padding.

        Args:
            source_BS: source token ids.
            targets_BL: target token ids.
            source_segments_BS: segments of the source; default: one per row.
            target_segments_BL: segments of the target; default: one per row.
            source_positions_BS: ignored.
            target_positions_BL: ignored.
        """
        if source_segments_BS is None:
            source_segments_BS = jnp.ones_like(source_BS)
        if target_segments_BL is None:
            target_segments_BL = jnp.ones_like(targets_BL)
        source, states = self.encode(source_BS, source_segments_BS)
        entering = self._final(states, source_segments_BS, target_segments_BL)
        x_BLH, _ = self.decoder(self.tokens(targets_BL), target_segments_BL, entering=entering)
        return self._attend(x_BLH, target_segments_BL, source)

    def encode(
        self, source_BS: jax.Array, segments_BS: jax.Array
    ) -> tuple[EncodedSource, list[LstmState]]:
        """Return the encoder's outputs, and the states [B, S, H] of its layers at every token."""
        encoded_BSH, states = self.encoder(self.tokens(source_BS), segments_BS)
        return EncodedSource(encoded_BSH, segments_BS, source_BS), states

    def start(self, source_BS: jax.Array, source_segments_BS: jax.Array, length: int) -> LstmCache:
        """Return a cache that holds the source as segment 1; targets may have any `length`."""
        source, states = self.encode(source_BS, source_segments_BS)
        ones_B1 = jnp.ones((source_BS.shape[0], 1), jnp.int32)
        state_BN2H = last_states(self._final(states, source_segments_BS, ones_B1))
        return LstmCache(state_BN2H, ones_B1[:, 0], source)

    def decode(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array,
        segment_ids_BL: jax.Array,
        cache: LstmCache,
    ) -> tuple[jax.Array, LstmCache]:
        """Return logits [B, L, V] of tokens after those in the cache, and the cache with them."""
        assert cache.source is not None
        x_BLH, states = self.decoder(self.tokens(tokens_BL), segment_ids_BL, cache)
        after = LstmCache(last_states(states), segment_ids_BL[:, -1], cache.source)
        return self.logits(self._attend(x_BLH, segment_ids_BL, cache.source)), after

    def _final(
        self, states: list[LstmState], source_segments_BS: jax.Array, target_segments_BL: jax.Array
    ) -> list[LstmState]:
        """Return the final encoder state [B, L, H] in the segment of each target."""
        # Forward units end at a segment's last token, backward ones at its first.
        firsts_BS = segment_starts(source_segments_BS)
        lasts_BS = segment_starts(source_segments_BS, reverse=True)
        same_BLS = target_segments_BL[:, :, None] == source_segments_BS[:, None]
        where_BLS = [same_BLS & lasts_BS[:, None], same_BLS & firsts_BS[:, None]]

        def pick(x_BSH: jax.Array) -> jax.Array:
            # Products with one-hot masks: the gradient of a look-up would be a scatter.
            parts = jnp.split(x_BSH, 1 + self.config.bidirectional, axis=-1)
            exact = partial(jnp.einsum, "bls,bsh->blh", precision="highest")
            return jnp.concatenate([*map(exact, where_BLS, parts)], axis=-1)

        return [LstmState(*map(pick, state)) for state in states]

    def _attend(
        self, x_BLH: jax.Array, segments_BL: jax.Array, source: EncodedSource
    ) -> jax.Array | CopyState:
        keys_BS1H = source.encoded_BSD[:, :, None]
        mask = AttentionMask(False, segments_BL, source.segment_ids_BS)
        context_BL1H = attention(x_BLH[:, :, None], keys_BS1H, keys_BS1H, mask, scale=1.0)
        both_BLH = jnp.concatenate([x_BLH, context_BL1H[:, :, 0]], axis=-1)
        x_BLH = jnp.tanh(self.attended(both_BLH))
        if not self.config.copy:
            return x_BLH
        query_BLH, gate_BL1 = self.copy_query(x_BLH), self.copy_gate(x_BLH)
        return attend_to_source(x_BLH, query_BLH, gate_BL1, segments_BL, source)
