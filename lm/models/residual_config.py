"""Configuration of a stack's residual stream: residual type, norms, multipliers, dropout."""

from __future__ import annotations

from dataclasses import dataclass

SUBLAYERS = ("attention", "cross_attention", "feed_forward")  # sublayers of a block, in order


@dataclass(frozen=True, kw_only=True)
class ResidualConfig:
    """Residual stream of a stack; fields are documented in `lm/config/keys.py`."""

    residual: str = "sum"
    residual_multiplier: float = 1.0
    concat_width: int = 32
    hyper_streams: int = 4
    hyper_dynamic: bool = True
    value_residual: str = "none"
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    norm_placement: str = "pre"
    norm_unit_offset: bool = False
    norm_bias: bool = True
    embedding_norm: bool = False
    scale_embeddings: bool = False
    embedding_multiplier: float = 1.0
    dropout: float = 0.0
    final_dropout: bool = False
    activation_dropout: float = 0.0
    scale_residual_init: bool = True
