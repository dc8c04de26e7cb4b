"""The decoder-only language model: embeddings, a causal stack, logits.

Shape letters: B batch, L length, D model, V vocabulary.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.kernels.attention import Visibility
from lm.models.cache import Cache, empty_cache
from lm.models.config import TransformerConfig
from lm.models.layers import Embedding, Linear
from lm.models.positions import sinusoidal
from lm.models.transformer import Stack, write_segments
from lm.parallel.rules import constrain


class Decoder(nn.Module):
    """Next-token logits of a batch of token sequences."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array | None = None,
        segment_ids_BL: jax.Array | None = None,
        cache: Cache | None = None,
        deterministic: bool = True,
    ) -> jax.Array | tuple[jax.Array, Cache]:
        """Logits [B, L, V] in float32; with a cache, (logits, the cache after these tokens).

        Positions default to 0 … L-1, segments to one a row; tokens see their own segment only.
        """
        c = self.config
        B, L = tokens_BL.shape
        embedding = Embedding(c.vocab_size, c.d_model, "vocab", c.init_std, c.dtype, name="tokens")
        x_BLD = embedding(tokens_BL)
        if c.positions == "learned":
            table = Embedding(
                c.max_length, c.d_model, "positions", c.init_std, c.dtype, name="positions"
            )
            x_BLD += table.first(L) if positions_BL is None else table(positions_BL)
        if positions_BL is None:
            positions_BL = jnp.arange(L)[None]
        if c.positions == "sinusoidal":
            x_BLD += sinusoidal(positions_BL, c.d_model).astype(c.dtype)
        x_BLD = nn.Dropout(c.dropout, deterministic=deterministic)(x_BLD)
        x_BLD = constrain(x_BLD, "batch", "length", "embed")

        if cache is None:
            visibility = Visibility(True, segment_ids_BL)
        else:
            segments_BL = jnp.ones((B, L), jnp.int32) if segment_ids_BL is None else segment_ids_BL
            cache = write_segments(cache, segments_BL)
            visibility = Visibility(True, segments_BL, cache.segment_ids_BS, cache.index)
        x_BLD, cache = Stack(c, name="stack")(x_BLD, positions_BL, visibility, cache, deterministic)

        if c.tie_embeddings:
            logits_BLV = embedding.attend(x_BLD)
        else:
            head = Linear(
                (c.d_model,),
                (c.vocab_size,),
                ("embed", "vocab"),
                False,
                c.init_std,
                c.dtype,
                out_dtype=jnp.float32,
                name="head",
            )
            logits_BLV = head(x_BLD)
        logits_BLV = constrain(logits_BLV, "batch", "length", "vocab")
        return logits_BLV if cache is None else (logits_BLV, cache)

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache for `batch` rows of up to `length` tokens."""
        c = self.config
        return empty_cache(c.n_layers, batch, length, c.n_kv_heads, c.head_dim, c.dtype)
