"""The recurrent encoder–decoder with attention, as Dong and Lapata 2016 simplify Luong et al. 2015.

Shape letters: B batch, S source length, L target length, H hidden units, N layers, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from lm.kernels.dot_product_attention import AttentionMask, attention
from lm.kernels.lstm_scan import LstmState
from lm.models.classic.lstm import LstmCache, Source, Stack, last, segment_starts
from lm.models.classic.recurrent import Recurrent
from lm.models.layers import init_linear
from lm.models.variables import Kind, Role


class LstmEncoderDecoder(Recurrent):
    """Each layer of the decoder starts from the final state of that layer of the encoder.

    The decoder's outputs h attend to the encoder's by dot products, and logits are made of
    tanh(W [h; context]). Nothing of that goes into the next step, so that in training attention is
    computed for all steps at once. With config.bidirectional the encoder reads both ways.
    """

    def setup(self) -> None:
        super().setup()
        c = self.config
        self.encoder = Stack(replace(c, stream="source"), self.deterministic, c.bidirectional)
        self.decoder = Stack(c, self.deterministic)
        role, n_hidden = Role(Kind.MATRIX, c.stream, "body"), (c.d_hidden,)
        self.attended = init_linear(c, 2 * c.d_hidden, n_hidden, ("hidden", "hidden"), role)

    def __call__(self, *inputs: jax.Array) -> jax.Array:
        """Logits [B, L, V] of the token after each target token, float32.

        The inputs are those of `decoder_hidden`.
        """
        return self.logits(self.decoder_hidden(*inputs))

    def decoder_hidden(
        self,
        source_BS: jax.Array,
        targets_BL: jax.Array,
        source_segments_BS: jax.Array,
        target_segments_BL: jax.Array,
        source_positions_BS: jax.Array | None = None,
        target_positions_BL: jax.Array | None = None,
    ) -> jax.Array:
        """What the logits are made of, [B, L, H].

        A target sees the sources and the earlier targets of its own segment; 0 is padding.
        """
        source, states = self.encode(source_BS, source_segments_BS)
        entering = self._final(states, source_segments_BS, target_segments_BL)
        x_BLH, _ = self.decoder(self.tokens(targets_BL), target_segments_BL, entering=entering)
        return self._attend(x_BLH, target_segments_BL, source)

    def encode(
        self, source_BS: jax.Array, segments_BS: jax.Array
    ) -> tuple[Source, list[LstmState]]:
        """The encoder's outputs, and the states [B, S, H] of its layers after every token."""
        encoded_BSH, states = self.encoder(self.tokens(source_BS), segments_BS)
        return Source(encoded_BSH, segments_BS), states

    def start(self, source_BS: jax.Array, source_segments_BS: jax.Array, length: int) -> LstmCache:
        """A cache for targets, of any `length`, that has read the source, which is segment 1."""
        source, states = self.encode(source_BS, source_segments_BS)
        ones_B1 = jnp.ones((len(source_BS), 1), jnp.int32)
        state_BN2H = last(self._final(states, source_segments_BS, ones_B1))
        return LstmCache(state_BN2H, ones_B1[:, 0], source)

    def decode(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array,
        segment_ids_BL: jax.Array,
        cache: LstmCache,
    ) -> tuple[jax.Array, LstmCache]:
        """Logits [B, L, V] of tokens that follow those in the cache, and the cache with them."""
        assert cache.source is not None
        x_BLH, states = self.decoder(self.tokens(tokens_BL), segment_ids_BL, cache)
        after = LstmCache(last(states), segment_ids_BL[:, -1], cache.source)
        return self.logits(self._attend(x_BLH, segment_ids_BL, cache.source)), after

    def _final(
        self, states: list[LstmState], source_segments_BS: jax.Array, target_segments_BL: jax.Array
    ) -> list[LstmState]:
        """The state [B, L, H] in which the encoder left the segment of each target."""
        # Units that read forwards have read a segment at its last token, the others at its first.
        firsts_BS = segment_starts(source_segments_BS)
        lasts_BS = segment_starts(source_segments_BS, reverse=True)
        same_BLS = target_segments_BL[:, :, None] == source_segments_BS[:, None]
        where_BLS = [same_BLS & lasts_BS[:, None], same_BLS & firsts_BS[:, None]]

        def pick(x_BSH: jax.Array) -> jax.Array:
            # Products with indicators: the gradient of a look-up would be a scatter.
            parts = jnp.split(x_BSH, 1 + self.config.bidirectional, axis=-1)
            exact = partial(jnp.einsum, "bls,bsh->blh", precision="highest")
            return jnp.concatenate([*map(exact, where_BLS, parts)], axis=-1)

        return [LstmState(*map(pick, state)) for state in states]

    def _attend(self, x_BLH: jax.Array, segments_BL: jax.Array, source: Source) -> jax.Array:
        keys_BS1H = source.encoded_BSH[:, :, None]
        seen = AttentionMask(False, segments_BL, source.segment_ids_BS)
        context_BL1H = attention(
            x_BLH[:, :, None], keys_BS1H, keys_BS1H, seen, kernel="xla", scale=1.0
        )
        both_BLH = jnp.concatenate([x_BLH, context_BL1H[:, :, 0]], axis=-1)
        return jnp.tanh(self.attended(both_BLH))
