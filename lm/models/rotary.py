"""RoPE variants beyond `attention.py`: scaled to longer contexts, or not in all layers.

Two kinds of scaling, "dynamic" and "longrope", depend on the length of the text, for packed rows
that of each text. In decoding it is the length so far, as in `transformers`: cached tokens
keep the rotation for the length at which they were added. Past the original context, cached
decoding therefore differs from the full sequence, where later tokens also change the rotation of
earlier ones: for "longrope" if a text grows beyond that context during decoding, for "dynamic"
always.

Shape letters: B batch, L length, H heads, K head dim, R rotated part of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lm.config.model_rules import rotary_width
from lm.models.attention import Rotation, rotary_angles, rotate
from lm.models.transformer_config import TransformerConfig

Scale = Callable[[jax.Array], jax.Array]  # maps frequencies [R/2]

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


@flax.struct.dataclass
class LayerRotation(Rotation):
    """RoPE that is scaled, normalized, or not in all layers.

    Attributes:
        config: configuration of the stack.
        local_angles_BLR: angles of local layers, if they differ from global ones.
        temperature: factor of queries in layers without positions; None: 1.
        is_global: true if the layer ignores the window; None: all layers are alike.
        is_nope: true if the layer has no positions; None: all layers have them.
    """

    config: TransformerConfig = flax.struct.field(pytree_node=False, kw_only=True)
    local_angles_BLR: jax.Array | None = None
    temperature: jax.Array | None = None
    is_global: jax.Array | None = None
    is_nope: jax.Array | None = None

    def of_layer(self, is_global: jax.Array | None, is_nope: jax.Array | None) -> Rotation:
        """Return the RoPE of a layer; for arguments see `LayerInputs`."""
        angles_BLR = self.angles_BLR
        if self.local_angles_BLR is not None:
            assert is_global is not None
            angles_BLR = jnp.where(is_global, angles_BLR, self.local_angles_BLR)
        return replace(self, angles_BLR=angles_BLR, is_global=is_global, is_nope=is_nope)

    def queries(self, q_BLHK: jax.Array) -> jax.Array:
        """Return rotated queries.

        They are multiplied by the square of `attention_factor`, which equals the factor on both
        queries and keys, where they are rotated. Local layers with their own theta are not scaled.
        """
        c, R = self.config, 2 * self.angles_BLR.shape[-1]
        plain_BLHK = q_BLHK
        if self.temperature is not None:
            plain_BLHK = (q_BLHK * self.temperature).astype(q_BLHK.dtype)
        q_BLHK = rotate(q_BLHK, self.angles_BLR)
        if c.rope_scaling != "none":
            factor = jnp.asarray(attention_factor(c) ** 2, jnp.float32)
            if c.window and c.rope_theta_local:
                is_global = False if self.is_global is None else self.is_global
                factor = jnp.where(is_global, factor, 1.0)
            factor_K = jnp.where(jnp.arange(q_BLHK.shape[-1]) < R, factor, 1.0)
            q_BLHK = (q_BLHK * factor_K).astype(q_BLHK.dtype)
        return self._where_rotated(q_BLHK, plain_BLHK)

    def keys(self, k_BSGK: jax.Array) -> jax.Array:
        """Return rotated keys."""
        return self._where_rotated(rotate(k_BSGK, self.angles_BLR), k_BSGK)

    def _where_rotated(self, x_BLHK: jax.Array, plain_BLHK: jax.Array) -> jax.Array:
        """Return rotated heads, normalized, or the plain ones in a layer without positions."""
        if self.config.rope_norm:
            squares = jnp.square(x_BLHK.astype(jnp.float32)).mean(-1, keepdims=True)
            x_BLHK = (x_BLHK * jax.lax.rsqrt(squares + self.config.norm_eps)).astype(x_BLHK.dtype)
        return x_BLHK if self.is_nope is None else jnp.where(self.is_nope, plain_BLHK, x_BLHK)


def further_rotations(
    config: TransformerConfig, positions_BL: jax.Array, segments_BL: jax.Array | None
) -> LayerRotation:
    """Return the RoPE of all layers; for arguments see `rotations`.

    Local layers with their own theta are never scaled to a longer context: their distances
    stay inside the window. The temperature of queries depends on the length of the context
    (Nakanishi 2025, arXiv 2501.19399; Llama 4's released code).
    """
    c, R = config, rotary_width(config)
    scale = rope_scaling(c, positions_BL, segments_BL)
    angles, local = rotary_angles(positions_BL, R, c.rope_theta, scale), None
    if c.window and c.rope_theta_local:
        local = rotary_angles(positions_BL, R, c.rope_theta_local)
        angles, local = (angles, local) if c.is_global(c.n_layers) is not None else (local, None)
    temperature = None
    if c.nope_temperature:
        steps_BL = jnp.floor((positions_BL + 1.0) / c.nope_temperature_length)
        temperature = (1 + c.nope_temperature * jnp.log1p(steps_BL))[..., None, None]
    return LayerRotation(angles, config=c, local_angles_BLR=local, temperature=temperature)


def text_lengths(positions_BL: jax.Array, segments_BL: jax.Array | None) -> jax.Array:
    """Return the length of the text of each token, [B, L] or [B, 1]: its last position + 1."""
    if segments_BL is None:
        return positions_BL.max(axis=1, keepdims=True) + 1
    is_same_BLL = segments_BL[:, :, None] == segments_BL[:, None, :]
    return jnp.where(is_same_BLL, positions_BL[:, None, :], 0).max(axis=2) + 1


def attention_factor(config: TransformerConfig) -> float:
    """Return the factor of rotated queries and keys.

    Unless it is configured: 0.1 ln s + 1 (YaRN, Peng et al. 2023, eq. 15), or
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


def score_factor(config: TransformerConfig, mscale_all_dim: float) -> float:
    """Return the attention-score factor for a longer context (DeepSeek's MLA).

    It is (0.1 m ln s + 1)² for the factor s and m = `mscale_all_dim` (DeepSeek-V2's released code).
    """
    if config.rope_scaling == "none":
        return 1.0
    return (0.1 * mscale_all_dim * math.log(max(config.rope_factor, 1.0)) + 1) ** 2


def rope_scaling(
    config: TransformerConfig, positions_BL: jax.Array, segments_BL: jax.Array | None
) -> Scale | None:
    """Return the function that scales RoPE frequencies to a longer context; None to keep them.

    "linear" divides all by the factor (Chen et al. 2023). "llama3" divides those with fewer than
    `rope_low_frequency` periods in the original context, keeps those with more than
    `rope_high_frequency`, and interpolates linearly in between (Llama 3.1's released code). "yarn"
    does the same, but interpolates linearly in the frequency's index, between integers with
    `rope_truncate` (Peng et al. 2023, §3.2 and the released code). "dynamic" raises theta so that
    the longest wavelength grows with the text (NTK-aware scaling, ibid., §3.3), "longrope" divides
    by `rope_short_factor`, or `rope_long_factor` for texts beyond the original context (Ding et al.
    2024).

    Args:
        config: configuration of the stack.
        positions_BL: positions of the tokens.
        segments_BL: segment ids of the tokens; None: one text per row.
    """
    c, R = config, rotary_width(config)

    def llama3(frequencies: jax.Array) -> jax.Array:
        n_periods = c.rope_original_length * frequencies / (2 * math.pi)
        low, high = c.rope_low_frequency, c.rope_high_frequency
        kept = jnp.clip((n_periods - low) / max(high - low, 1e-30), 0, 1)
        return frequencies * (kept + (1 - kept) / c.rope_factor)

    def yarn(frequencies: jax.Array) -> jax.Array:
        first, last = (
            R * math.log(c.rope_original_length / (n * 2 * math.pi)) / (2 * math.log(c.rope_theta))
            for n in (c.rope_high_frequency, c.rope_low_frequency)
        )
        if c.rope_truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, R - 1)
        scaled = np.clip((np.arange(R // 2) - first) / (last - first or 0.001), 0, 1)
        return frequencies * (scaled / c.rope_factor + (1 - scaled)).astype(np.float32)

    def dynamic(frequencies: jax.Array) -> jax.Array:
        longer_BL = jnp.maximum(text_lengths(positions_BL, segments_BL) / c.rope_original_length, 1)
        growth_BL = c.rope_factor * longer_BL - (c.rope_factor - 1)
        return frequencies * growth_BL[..., None] ** (-jnp.arange(0, R, 2) / (R - 2))

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
