"""The one Transformer: a block, and a stack of blocks scanned over their stacked parameters.

Shape letters: B batch, L length, D model, N layers, K head dim.
"""

from __future__ import annotations

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.kernels.attention import Visibility
from lm.models.attention import KeyValue, SelfAttention
from lm.models.cache import Cache
from lm.models.config import TransformerConfig
from lm.models.layers import FeedForward, Norm
from lm.models.positions import rotary_angles
from lm.parallel.rules import constrain

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def norm(config: TransformerConfig, name: str) -> Norm:
    return Norm(config.norm, config.norm_eps, config.norm_bias, config.dtype, name=name)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); or, "post", norms after the sums."""

    config: TransformerConfig
    deterministic: bool

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        visibility: Visibility,
        angles_BLK: jax.Array | None,
        cached: KeyValue | None,
    ) -> tuple[jax.Array, KeyValue | None]:
        c = self.config

        def residual(x_BLD: jax.Array, y_BLD: jax.Array) -> jax.Array:
            y_BLD = nn.Dropout(c.dropout, deterministic=self.deterministic)(y_BLD)
            return constrain(x_BLD + y_BLD, "batch", "length", "embed")

        attend = SelfAttention(c, name="attention")
        feed_forward = FeedForward(
            c.d_model,
            c.d_ff,
            c.activation,
            c.bias,
            c.init_std,
            c.residual_std,
            c.dtype,
            name="feed_forward",
        )
        attention_norm, feed_forward_norm = norm(c, "attention_norm"), norm(c, "feed_forward_norm")
        if c.norm_placement == "pre":
            y_BLD, cached = attend(
                attention_norm(x_BLD), visibility, angles_BLK, cached, self.deterministic
            )
            x_BLD = residual(x_BLD, y_BLD)
            x_BLD = residual(x_BLD, feed_forward(feed_forward_norm(x_BLD)))
        else:
            y_BLD, cached = attend(x_BLD, visibility, angles_BLK, cached, self.deterministic)
            x_BLD = attention_norm(residual(x_BLD, y_BLD))
            x_BLD = feed_forward_norm(residual(x_BLD, feed_forward(x_BLD)))
        return x_BLD, cached


class Stack(nn.Module):
    """`n_layers` blocks; their parameters are stacked on a first axis "layers"."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        positions_BL: jax.Array,
        visibility: Visibility,
        cache: Cache | None,
        deterministic: bool,
    ) -> tuple[jax.Array, Cache | None]:
        c = self.config
        angles_BLK = None
        if c.positions == "rotary":
            angles_BLK = rotary_angles(positions_BL, c.head_dim, c.rope_theta)
        block = Block
        if c.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[c.remat], prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),
            length=c.n_layers,
            unroll=c.scan_unroll or c.n_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, deterministic, name="layers")
        cached = None if cache is None else (cache.keys_NBSGK, cache.values_NBSGK)
        x_BLD, cached = layers(x_BLD, visibility, angles_BLK, cached)
        if cache is not None:
            assert cached is not None
            index = cache.index + x_BLD.shape[1]
            cache = replace(cache, keys_NBSGK=cached[0], values_NBSGK=cached[1], index=index)
        if c.norm_placement == "pre":
            x_BLD = norm(c, "final_norm")(x_BLD)
        return x_BLD.astype(c.dtype), cache


def write_segments(cache: Cache, segment_ids_BL: jax.Array) -> Cache:
    """The cache with the segments of the tokens that are about to be written."""
    written = jax.lax.dynamic_update_slice(
        cache.segment_ids_BS, segment_ids_BL.astype(jnp.int32), (0, cache.index)
    )
    return replace(cache, segment_ids_BS=written)
