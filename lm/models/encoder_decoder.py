"""Encoder-decoder: an encoder reads the source, a causal decoder predicts the target.

Shape letters: B batch, S source length, L target length, D model, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lm.kernels.dot_product_attention import AttentionMask
from lm.models.cache import Cache, init_cache
from lm.models.copying import CopyState, EncodedSource, attend_to_source, mixed_logits
from lm.models.decoder import Model, position_table
from lm.models.layers import Embedding, make_norm
from lm.models.task_layers import last_of_row
from lm.models.transformer import Stack
from lm.models.transformer_config import TransformerConfig
from lm.models.variables import Kind, Role
from lm.parallel.mesh import constrain


def encoder_config(config: TransformerConfig) -> TransformerConfig:
    """Return the configuration of the encoder."""
    c = replace(config, stream="source", d_ff=config.encoder_d_ff or config.d_ff)
    if not (n := c.n_encoder_heads):
        return c
    return replace(c, n_heads=n, n_kv_heads=n, head_dim=c.n_heads * c.head_dim // n)


class EncoderDecoder(Model):
    """Encoder-decoder Transformer: Vaswani et al. 2017, T5 (Raffel et al. 2020) and others.

    Source and target share the token embeddings, unless `separate_tokens`; with
    `separate_embeddings` (BART, Lewis et al. 2020) the source has its own position table and
    embedding norm. With `n_mels` the source
    is audio, which `AudioFrontEnd` embeds (Whisper, Radford et al. 2022). With `copy` the output
    distribution covers generated and copied tokens, and the hidden states that logits are
    computed from are a `CopyState`.
    """

    def setup(self) -> None:
        super().setup()
        c = self.config
        of_source = encoder_config(c)
        self.encoder = Stack(of_source, c.n_layers, self.deterministic, causal=False)
        self.decoder = Stack(c, self.n_decoder_layers, self.deterministic, causal=True)
        if c.separate_tokens:
            width, role = c.embedding_size or c.d_model, Role(Kind.EMBEDDING, "source", "input")
            table = c.vocab_size, width, "vocab", role, c.table_init, c.dtype
            self.source_tokens = Embedding(*table)
        if c.separate_embeddings and c.positions == "learned":
            self.source_positions = position_table(of_source)
        if c.separate_embeddings and c.embedding_norm:
            self.source_embedding_norm = make_norm(of_source, part="input")
        if c.n_mels:
            from lm.models.audio_front_end import AudioFrontEnd

            self.front_end = AudioFrontEnd(of_source)
        if c.copy:
            matrix, head = (Role(kind, c.stream, "body") for kind in (Kind.MATRIX, Kind.HEAD))
            self.copy_query = self._linear(c.d_model, "pooled", matrix, bias=False)
            self.copy_gate = self._linear(1, "classes", head)

    @property
    def n_decoder_layers(self) -> int:
        """Number of decoder layers."""
        return self.config.n_decoder_layers or self.config.n_layers

    def __call__(self, *inputs: jax.Array) -> jax.Array:
        """Return the next-target logits [B, L, V], float32; inputs as for `decoder_hidden`."""
        return self.logits(self.decoder_hidden(*inputs))

    def decoder_hidden(
        self,
        source: jax.Array,
        targets_BL: jax.Array,
        source_segments_BS: jax.Array | None = None,
        target_segments_BL: jax.Array | None = None,
        source_positions_BS: jax.Array | None = None,
        target_positions_BL: jax.Array | None = None,
    ) -> Any:
        """Return the hidden states that the logits are computed from, [B, L, D].

        A target attends to the sources and earlier targets of its segment; segment 0 is padding.

        Args:
            source: source token ids [B, S], or log-mel features [B, 2 S, n_mels].
            targets_BL: target token ids.
            source_segments_BS: segments of the source; default: one per row.
            target_segments_BL: segments of the target; default: one per row.
            source_positions_BS: positions; default 0 … S-1.
            target_positions_BL: positions; default 0 … L-1.
        """
        if source_segments_BS is None:
            n_positions = -(-source.shape[1] // 2) if self.config.n_mels else source.shape[1]
            source_segments_BS = jnp.ones((source.shape[0], n_positions), jnp.int32)
        if target_segments_BL is None:
            target_segments_BL = jnp.ones_like(targets_BL)
        encoded_BSD = self.encode(source, source_segments_BS, source_positions_BS)
        x_BLD, target_positions_BL = self.embed(targets_BL, target_positions_BL)
        x_BLD, _ = self.decoder(
            x_BLD,
            target_positions_BL,
            AttentionMask(True, target_segments_BL),
            None,
            encoded_BSD,
            source_segments_BS,
        )
        encoded = EncodedSource(encoded_BSD, source_segments_BS, source)
        return self._copying(x_BLD, target_segments_BL, encoded)

    def logits(self, x_BLD: Any) -> jax.Array:
        """Return the logits [B, L, V] of hidden states or of a `CopyState`, float32."""
        return mixed_logits(super().logits, x_BLD)

    def _copying(
        self, x_BLD: jax.Array, segments_BL: jax.Array, source: EncodedSource
    ) -> jax.Array | CopyState:
        """Return the hidden states, as a `CopyState` if `copy` is set."""
        c = self.config
        if not c.copy:
            return x_BLD
        query_BLD = self.copy_query(x_BLD) * (c.width_ratio * c.d_model) ** -0.5
        gate_BL1 = self.copy_gate(self._scale_output(x_BLD))
        return attend_to_source(x_BLD, query_BLD, gate_BL1, segments_BL, source)

    def encode(
        self,
        source: jax.Array,
        source_segments_BS: jax.Array,
        positions_BS: jax.Array | None = None,
    ) -> jax.Array:
        """Return the encoded source, [B, S, D]; for arguments see `decoder_hidden`."""
        if self.config.n_mels:
            x_BSD, positions_BS = self.front_end(source, positions_BS)
            x_BSD = constrain(self.dropout(x_BSD), "rows", "residual_length", "embed")
        else:
            tokens = "source_tokens" if self.config.separate_tokens else "tokens"
            prefix = "source_" if self.config.separate_embeddings else ""
            further = f"{prefix}positions", f"{prefix}embedding_norm", "embedding_projection"
            names = tokens, *further
            x_BSD, positions_BS = self.embed(source, positions_BS, names=names)
        return self.encoder(x_BSD, positions_BS, AttentionMask(False, source_segments_BS))[0]

    def hidden(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array | None = None,
        segment_ids_BL: jax.Array | None = None,
        types_BL: jax.Array | None = None,
    ) -> jax.Array:
        """Return hidden states for classification, with the text in both stacks (BART, T5)."""
        segments_BL = jnp.ones_like(tokens_BL) if segment_ids_BL is None else segment_ids_BL
        encoded_BLD = self.encode(tokens_BL, segments_BL, positions_BL)
        if self.config.pooling == "shifted":
            start_B1 = jnp.full_like(tokens_BL[:, :1], self.config.start_id)
            if self.config.start_id < 0:
                start_B1 = last_of_row(tokens_BL[..., None], segments_BL)
            tokens_BL = jnp.concatenate([start_B1, tokens_BL[:, :-1]], axis=1)
        x_BLD, positions_BL = self.embed(tokens_BL, positions_BL)
        mask = AttentionMask(True, segments_BL)
        return self.decoder(x_BLD, positions_BL, mask, None, encoded_BLD, segments_BL)[0]

    def summary(self, x_BLD: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
        """Return the vector of the last token [B, D], pooled by a dense layer if shifted."""
        x_BD = super().summary(x_BLD, segment_ids_BL)
        return jnp.tanh(self.pooler(x_BD)) if self.config.pooling == "shifted" else x_BD

    def start(self, source: jax.Array, source_segments_BS: jax.Array, length: int) -> Cache:
        """Return a cache for up to `length` target tokens that holds the encoded source."""
        empty = init_cache(self.config, self.n_decoder_layers, source.shape[0], length)
        # The layers read the source while processing a dummy token, which is then dropped.
        ones = jnp.ones((source.shape[0], 1), jnp.int32)
        x_BLD, positions_BL = self.embed(ones, ones)
        mask = AttentionMask(True, ones, empty.segment_ids_BS)
        encoded_BSD = self.encode(source, source_segments_BS)
        _, cache = self.decoder(x_BLD, positions_BL, mask, empty, encoded_BSD, source_segments_BS)
        assert cache is not None
        assert cache.source is not None
        if self.config.copy:
            copied = EncodedSource(encoded_BSD, source_segments_BS, source)
            cache = replace(cache, source=replace(cache.source, copied=copied))
        return replace(empty, source=cache.source)

    def decode(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array,
        segment_ids_BL: jax.Array,
        cache: Cache,
    ) -> tuple[jax.Array, Cache]:
        """Return logits [B, L, V] of tokens after those in the cache, and the cache with them."""
        cache = cache.with_segments(segment_ids_BL)
        mask = AttentionMask(True, segment_ids_BL, cache.segment_ids_BS, cache.index)
        x_BLD, positions_BL = self.embed(tokens_BL, positions_BL)
        x_BLD, after = self.decoder(x_BLD, positions_BL, mask, cache)
        assert after is not None
        assert after.source is not None
        return self.logits(self._copying(x_BLD, segment_ids_BL, after.source.copied)), after
