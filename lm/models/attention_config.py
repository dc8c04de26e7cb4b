"""Configuration of a stack's attention and positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Projections with a bias, by values of --config.model.attention_bias.
ATTENTION_BIASES = {
    "all": ("query", "output_gate", "key", "value", "out"),
    "no_key": ("query", "output_gate", "value", "out"),
    "qkv": ("query", "output_gate", "key", "value"),
    "none": (),
}


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Attention and positions of a stack; fields are documented in `lm/config/keys.py`."""

    mixer: str = "attention"
    mixer_options: Any = None
    attention_layers: tuple[float, ...] = ()
    attention_bias: str = "same"
    qk_norm: bool = False
    qk_norm_over: str = "head"
    attention_scale: float = 0.0
    attention_softcap: float = 0.0
    attention_sinks: bool = False
    attention_gate: bool = False
    window: int = 0
    window_chunks: bool = False
    global_every: int = 0
    global_first: bool = False
    global_layers: tuple[float, ...] = ()
    positions: str = "learned"
    position_offset: int = 0
    nope_every: int = 0
    nope_layers: tuple[float, ...] = ()
    nope_temperature: float = 0.0
    nope_temperature_length: int = 8192
    rope_theta: float = 10_000.0
    rope_theta_local: float = 0.0
    rope_fraction: float = 1.0
    rope_norm: bool = False
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    rope_low_frequency: float = 1.0
    rope_high_frequency: float = 4.0
    rope_original_length: int = 8192
    rope_attention_factor: float = 0.0
    rope_truncate: bool = True
    rope_short_factor: tuple[float, ...] = ()
    rope_long_factor: tuple[float, ...] = ()
    relative_buckets: int = 32
    relative_max_distance: int = 128
    relative_per_layer: bool = False
    attention_dropout: float = 0.0
