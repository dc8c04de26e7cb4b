"""The encoder–decoder: an encoder reads the source, a causal decoder writes the target.

Shape letters: B batch, S source length, L target length, D model, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp

from lm.kernels.dot_product_attention import AttentionMask
from lm.models.base import Model
from lm.models.cache import Cache, empty_cache, write_segments
from lm.models.transformer import Stack


class EncoderDecoder(Model):
    """The Transformer (Vaswani 2017), T5 (Raffel 2020) and their relatives; one token table."""

    def setup(self) -> None:
        super().setup()
        c = self.config
        self.encoder = Stack(c, c.n_layers, self.deterministic, causal=False)
        self.decoder = Stack(c, self.n_decoder_layers, self.deterministic, causal=True)

    @property
    def n_decoder_layers(self) -> int:
        return self.config.n_decoder_layers or self.config.n_layers

    def __call__(self, *inputs: jax.Array) -> jax.Array:
        """Logits [B, L, V] of the token after each target token, float32.

        The inputs are those of `decoder_hidden`.
        """
        return self.logits(self.decoder_hidden(*inputs))

    def decoder_hidden(
        self,
        source_BS: jax.Array,
        targets_BL: jax.Array,
        source_segments_BS: jax.Array | None = None,
        target_segments_BL: jax.Array | None = None,
        source_positions_BS: jax.Array | None = None,
        target_positions_BL: jax.Array | None = None,
    ) -> jax.Array:
        """What the logits are made of, [B, L, D].

        A target sees the sources and the earlier targets of its own segment; 0 is padding. Without
        segments all is one.
        """
        if source_segments_BS is None:
            source_segments_BS = jnp.ones_like(source_BS)
        if target_segments_BL is None:
            target_segments_BL = jnp.ones_like(targets_BL)
        encoded_BSD = self.encode(source_BS, source_segments_BS, source_positions_BS)
        x_BLD, target_positions_BL = self.embed(targets_BL, target_positions_BL)
        x_BLD, _ = self.decoder(
            x_BLD,
            target_positions_BL,
            AttentionMask(True, target_segments_BL),
            None,
            encoded_BSD,
            source_segments_BS,
        )
        return x_BLD

    def encode(
        self,
        source_BS: jax.Array,
        source_segments_BS: jax.Array,
        positions_BS: jax.Array | None = None,
    ) -> jax.Array:
        """The encoded source, [B, S, D]."""
        x_BSD, positions_BS = self.embed(source_BS, positions_BS)
        visibility = AttentionMask(False, source_segments_BS)
        return self.encoder(x_BSD, positions_BS, visibility)[0]

    def hidden(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array | None = None,
        segment_ids_BL: jax.Array | None = None,
        types_BL: jax.Array | None = None,
    ) -> jax.Array:
        """For classification: the text goes into encoder and decoder (Lewis 2020, §3.1)."""
        segments_BL = jnp.ones_like(tokens_BL) if segment_ids_BL is None else segment_ids_BL
        encoded_BLD = self.encode(tokens_BL, segments_BL, positions_BL)
        x_BLD, positions_BL = self.embed(tokens_BL, positions_BL)
        seen = AttentionMask(True, segments_BL)
        return self.decoder(x_BLD, positions_BL, seen, None, encoded_BLD, segments_BL)[0]

    def start(self, source_BS: jax.Array, source_segments_BS: jax.Array, length: int) -> Cache:
        """A cache for targets of up to `length` tokens that has read the source."""
        c = self.config
        empty = empty_cache(
            self.n_decoder_layers, len(source_BS), length, c.n_kv_heads, c.head_dim, c.dtype
        )
        # The layers read the source while a token passes through them, which is then forgotten.
        ones = jnp.ones((len(source_BS), 1), jnp.int32)
        x_BLD, positions_BL = self.embed(ones, ones)
        visibility = AttentionMask(True, ones, empty.segment_ids_BS)
        encoded_BSD = self.encode(source_BS, source_segments_BS)
        _, cache = self.decoder(
            x_BLD, positions_BL, visibility, empty, encoded_BSD, source_segments_BS
        )
        assert cache is not None
        return replace(cache, index=empty.index)

    def decode(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array,
        segment_ids_BL: jax.Array,
        cache: Cache,
    ) -> tuple[jax.Array, Cache]:
        """Logits [B, L, V] of tokens that follow those in the cache, and the cache with them."""
        cache = write_segments(cache, segment_ids_BL)
        visibility = AttentionMask(True, segment_ids_BL, cache.segment_ids_BS, cache.index)
        x_BLD, positions_BL = self.embed(tokens_BL, positions_BL)
        x_BLD, after = self.decoder(x_BLD, positions_BL, visibility, cache)
        assert after is not None
        return self.logits(x_BLD), after
