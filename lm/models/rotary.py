"""Rotary position embeddings (RoPE), and their scaling to contexts beyond the original one.

Two kinds of scaling, "dynamic" and "longrope", depend on the length of the text, that of each text
of a packed row. While decoding it is the length so far, as in `transformers`: tokens in the cache
keep the rotation of the length at which they came. Past the original context, cached decoding is
therefore not what the full sequence gives, in which later tokens turn earlier ones too: for
"longrope" from a text that grows beyond that context while it is decoded, for "dynamic" from any.

Shape letters: B batch, L length, H heads, K head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lm.models.transformer_config import TransformerConfig

Scale = Callable[[jax.Array], jax.Array]

# Fields of TransformerConfig that each value of `rope_scaling` uses.
SCALING_FIELDS: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "linear": ("rope_factor",),
    "llama3": (
        *("rope_factor", "rope_original_length"),
        *("rope_low_frequency", "rope_high_frequency"),
    ),
    "dynamic": ("rope_factor", "rope_original_length"),
    "yarn": (
        *("rope_factor", "rope_original_length", "rope_attention_factor"),
        *("rope_low_frequency", "rope_high_frequency", "rope_truncate"),
    ),
    "longrope": (
        *("rope_factor", "rope_original_length", "rope_attention_factor"),
        *("rope_short_factor", "rope_long_factor"),
    ),
}


def rotate(x_BLHK: jax.Array, angles_BLK: jax.Array, factor: float = 1.0) -> jax.Array:
    """Rotate the pairs (k, k + K/2) of every head by the angles (Llama's layout).

    Args:
        x_BLHK: queries or keys.
        angles_BLK: angles [B, L, K/2].
        factor: what they are multiplied by beside (`attention_factor`).
    """
    cos_BL1K = jnp.cos(angles_BLK)[:, :, None, :]
    sin_BL1K = jnp.sin(angles_BLK)[:, :, None, :]
    if factor != 1:
        cos_BL1K, sin_BL1K = cos_BL1K * factor, sin_BL1K * factor
    a_BLHK, b_BLHK = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate(
        [a_BLHK * cos_BL1K - b_BLHK * sin_BL1K, a_BLHK * sin_BL1K + b_BLHK * cos_BL1K], axis=-1
    )
    return rotated.astype(x_BLHK.dtype)


def rotary_angles(
    positions_BL: jax.Array, head_dim: int, theta: float, scale: Scale | None = None
) -> jax.Array:
    """Return the RoPE angles [B, L, K/2] of each position (Su et al. 2021, eq. 15).

    Args:
        positions_BL: positions.
        head_dim: K.
        theta: base of the wavelengths.
        scale: maps the frequencies [K/2] to those of a longer context, [K/2] or [B, L, K/2].
    """
    frequencies = theta ** (-jnp.arange(0, head_dim, 2) / head_dim)
    return positions_BL[..., None] * (scale(frequencies) if scale else frequencies)


def layer_angles(
    config: TransformerConfig, positions_BL: jax.Array, segments_BL: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Return the RoPE angles [B, L, K/2], and those of local layers where they differ.

    Local layers with a theta of their own are never scaled to a longer context: their distances
    stay inside the window.

    Args:
        config: configuration of the stack.
        positions_BL: positions of the tokens.
        segments_BL: segment ids of the tokens; None: one text a row.
    """
    c = config
    angles = rotary_angles(
        positions_BL, c.head_dim, c.rope_theta, rope_scaling(c, positions_BL, segments_BL)
    )
    if not (c.window and c.rope_theta_local):
        return angles, None
    local = rotary_angles(positions_BL, c.head_dim, c.rope_theta_local)
    return (angles, local) if c.global_every else (local, None)


def text_lengths(positions_BL: jax.Array, segments_BL: jax.Array | None) -> jax.Array:
    """Return the length of the text of each token, [B, L] or [B, 1]: its last position + 1."""
    if segments_BL is None:
        return positions_BL.max(axis=1, keepdims=True) + 1
    is_same_BLL = segments_BL[:, :, None] == segments_BL[:, None, :]
    return jnp.where(is_same_BLL, positions_BL[:, None, :], 0).max(axis=2) + 1


def attention_factor(config: TransformerConfig) -> float:
    """Return what rotated queries and keys are multiplied by.

    Unless the configuration says it: 0.1 ln s + 1 (YaRN, Peng et al. 2023, eq. 15), or
    sqrt(1 + ln s / ln L) (LongRoPE, Ding et al. 2024, §3.3 of Phi-3's released code) for the factor
    s and the original length L.
    """
    c, factor = config, config.rope_factor
    if "rope_attention_factor" not in SCALING_FIELDS[c.rope_scaling]:
        return 1.0
    if c.rope_attention_factor or factor <= 1:
        return c.rope_attention_factor or 1.0
    if c.rope_scaling == "yarn":
        return 0.1 * math.log(factor) + 1
    return math.sqrt(1 + math.log(factor) / math.log(c.rope_original_length))


def rope_scaling(
    config: TransformerConfig, positions_BL: jax.Array, segments_BL: jax.Array | None
) -> Scale | None:
    """Return the function that scales RoPE frequencies to a longer context; None to keep them.

    "linear" divides all by the factor (Chen et al. 2023). "llama3" divides those with fewer than
    `rope_low_frequency` periods in the original context, keeps those with more than
    `rope_high_frequency`, and interpolates linearly in between (Llama 3.1's released code). "yarn"
    does so too, but interpolates linearly in the index of the frequency, between whole ones with
    `rope_truncate` (Peng et al. 2023, §3.2 and the released code). "dynamic" raises theta so that
    the longest wavelength grows with the text (NTK-aware scaling, ibid., §3.3), "longrope" divides
    by `rope_short_factor`, of texts beyond the original context by `rope_long_factor` (Ding et al.
    2024).

    Args:
        config: configuration of the stack.
        positions_BL: positions of the tokens.
        segments_BL: segment ids of the tokens; None: one text a row.
    """
    c, K = config, config.head_dim

    def llama3(frequencies: jax.Array) -> jax.Array:
        n_periods = c.rope_original_length * frequencies / (2 * math.pi)
        low, high = c.rope_low_frequency, c.rope_high_frequency
        kept = jnp.clip((n_periods - low) / (high - low), 0, 1)
        return frequencies * (kept + (1 - kept) / c.rope_factor)

    def yarn(frequencies: jax.Array) -> jax.Array:
        first, last = (
            K * math.log(c.rope_original_length / (n * 2 * math.pi)) / (2 * math.log(c.rope_theta))
            for n in (c.rope_high_frequency, c.rope_low_frequency)
        )
        if c.rope_truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, K - 1)
        scaled = np.clip((np.arange(K // 2) - first) / (last - first or 0.001), 0, 1)
        return frequencies * (scaled / c.rope_factor + (1 - scaled)).astype(np.float32)

    def dynamic(frequencies: jax.Array) -> jax.Array:
        longer_BL = jnp.maximum(text_lengths(positions_BL, segments_BL) / c.rope_original_length, 1)
        growth_BL = c.rope_factor * longer_BL - (c.rope_factor - 1)
        return frequencies * growth_BL[..., None] ** (-jnp.arange(0, K, 2) / (K - 2))

    def longrope(frequencies: jax.Array) -> jax.Array:
        is_long_BL = text_lengths(positions_BL, segments_BL) > c.rope_original_length
        short, long = (jnp.asarray(f) for f in (c.rope_short_factor, c.rope_long_factor))
        return frequencies / jnp.where(is_long_BL[..., None], long, short)

    kinds: dict[str, Scale] = {
        "linear": lambda frequencies: frequencies / c.rope_factor,
        "llama3": llama3,
        "yarn": yarn,
        "dynamic": dynamic,
        "longrope": longrope,
    }
    return kinds.get(c.rope_scaling)
