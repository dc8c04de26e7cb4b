"""Position information besides RoPE (`rotary.py`): sinusoids, relative biases, ALiBi.

Shape letters: B batch, L queries, S keys, D model, H heads.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lm.models.attention import MixerInputs
from lm.models.transformer_config import TransformerConfig
from lm.models.variables import Kind, Part, Role, param
from lm.parallel.mesh import current_mesh


def has_position_table(config: Any) -> bool:
    """Return whether a model of any family adds learned positions to its embeddings."""
    of_mixer = getattr(getattr(config, "mixer_options", None), "relative_input", False)
    return of_mixer or getattr(config, "positions", "none") == "learned"


def sinusoidal(positions_BL: jax.Array, d_model: int) -> jax.Array:
    """Return sinusoidal position vectors [B, L, D] (Vaswani et al. 2017, §3.5).

    PE(pos, 2i) = sin(pos / 10000^(2i/D)), PE(pos, 2i+1) = cos(pos / 10000^(2i/D)).
    """
    frequencies = 10_000.0 ** (-jnp.arange(0, d_model, 2) / d_model)
    angles = positions_BL[..., None] * frequencies
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*angles.shape[:-1], -1)


def relative_buckets(
    distances: jax.Array, bidirectional: bool, n_buckets: int, max_distance: int
) -> jax.Array:
    """Return the bucket of each distance, key position − query position (Raffel et al. 2020, §2.1).

    Half of the buckets represent single distances, the other half grow logarithmically up to
    `max_distance`.

    Args:
        distances: integers of any shape.
        bidirectional: keys after the query use half of the buckets; otherwise all use bucket 0.
        n_buckets: number of buckets.
        max_distance: distance from which all use the last bucket.
    """
    first: jax.Array | int = 0
    if bidirectional:
        n_buckets //= 2
        first = jnp.where(distances > 0, n_buckets, 0)
        distances = jnp.abs(distances)
    else:
        distances = jnp.maximum(-distances, 0)
    exact = n_buckets // 2
    ratio = jnp.log(jnp.maximum(distances, 1) / exact) / math.log(max_distance / exact)
    far = exact + (ratio * (n_buckets - exact)).astype(jnp.int32)
    return first + jnp.where(distances < exact, distances, jnp.minimum(far, n_buckets - 1))


class RelativeBias(nn.Module):
    """Bias of attention scores by the distance between query and key, per head (T5).

    Distances count slots of the row: within a packed document they equal differences of
    positions, and other documents are masked.
    """

    config: TransformerConfig
    bidirectional: bool

    @nn.compact
    def __call__(self, distances: jax.Array) -> jax.Array:
        """Return the bias [H, …] of distances of any shape, float32."""
        c = self.config
        part: Part = "layers" if c.relative_per_layer else "input"
        role = Role(Kind.POSITION_BIAS, c.stream, part, inputs=1)
        init, shape = c.kernel_init(c.output_std(c.n_heads)), (c.relative_buckets, c.n_heads)
        table = param(self, "embedding", init, shape, ("positions", "heads"), role)
        buckets = relative_buckets(
            distances, self.bidirectional, c.relative_buckets, c.relative_max_distance
        )
        # A product with one-hot buckets: the gradient of a look-up would be a scatter.
        indicators = jax.nn.one_hot(buckets, c.relative_buckets, dtype=jnp.float32)
        return jnp.einsum("...R,RH->H...", indicators, table)


def alibi_slopes(n_heads: int) -> np.ndarray:
    """Return the slope of each head, [H] float32 (Press, Smith and Lewis 2022, §3).

    For a power of two n they are 2^(-8/n), 2^(-16/n), …, 2^-8. Other numbers of heads have the
    slopes of the next lower power of two, followed by the first, third, … of twice that power (the
    authors' released code).
    """
    power = 2 ** int(math.log2(n_heads))
    slopes = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-4 * np.arange(1, 2 * power, 2) / power)
    return np.concatenate([slopes, between[: n_heads - power]]).astype(np.float32)


def alibi_bias(n_heads: int, distances: jax.Array) -> jax.Array:
    """Return the position bias of ALiBi, slope times -|i - j| (Press et al. 2022, §3).

    Keys after the query, visible in a prefix or an encoder, count by absolute distance too.

    Args:
        n_heads: number of query heads H.
        distances: distances of any shape; as in `RelativeBias`, they count tokens of the row.

    Returns:
        The bias [H, …], float32.
    """
    slopes = jnp.asarray(alibi_slopes(n_heads)).reshape(-1, *(1,) * distances.ndim)
    return -slopes * jnp.abs(distances)


def position_bias(
    config: TransformerConfig,
    bidirectional: bool,
    n_queries: int,
    n_keys: int,
    offset: jax.Array | int,
    whole: bool,
) -> jax.Array:
    """Return the position bias of a stack's scores, inside its module.

    Args:
        config: configuration of the stack, whose positions are "relative" or "alibi".
        bidirectional: keys after the query are visible.
        n_queries: number of queries L.
        n_keys: number of keys S.
        offset: index of the first query among the keys, which may differ between rows.
        whole: the queries are the whole sequence; there is no cache.

    Returns:
        The bias [H, L, S]; by distance, from 1 - L to S - 1, [H, L + S - 1]; if offsets differ
        between rows, by distance from 1 - S to L - 1. For "disentangled" positions the table
        [R, D]; with `relative_per_layer` the distances, for `layer_bias`.
    """
    if config.positions == "disentangled":
        from lm.models.disentangled_attention import RelativeTable

        return RelativeTable(config, name="relative_table")()
    by_distance = config.attention == "flash" and whole and current_mesh() is not None
    if isinstance(offset, jax.Array) and offset.ndim:
        distances = jnp.arange(1 - n_keys, n_queries)
    elif by_distance:
        distances = jnp.arange(1 - n_queries, n_keys)
    else:
        distances = jnp.arange(n_keys) - (offset + jnp.arange(n_queries))[:, None]
    if config.positions == "alibi":
        return alibi_bias(config.n_heads, distances)
    if config.relative_per_layer:
        return distances
    return RelativeBias(config, bidirectional, name="relative_bias")(distances)


def layer_bias(config: TransformerConfig, inputs: MixerInputs) -> MixerInputs:
    """Compute one layer's position bias from distances, inside its module (UMT5)."""
    assert inputs.bias_HLS is not None
    bias = RelativeBias(config, not inputs.mask.causal, name="relative_bias")
    return replace(inputs, bias_HLS=bias(inputs.bias_HLS))
