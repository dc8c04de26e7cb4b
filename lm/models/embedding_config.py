"""Configuration of embeddings, output layers and classifiers, and of encoders' extra parts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    """Embeddings and outputs around a stack; fields are documented in `lm/config/keys.py`."""

    n_mels: int = 0
    max_source_length: int = 0
    n_encoder_heads: int = 0
    encoder_d_ff: int = 0
    token_types: int = 0
    embedding_size: int = 0
    projection_first: bool = False
    separate_embeddings: bool = False
    separate_tokens: bool = False
    tie_embeddings: bool = True
    scale_logits: bool = False
    logits_scaling: float = 1.0
    logit_softcap: float = 0.0
    transform_bias: bool = True
    transform_activation: str = "family"
    first_conv: int = 0
    conv_activation: str = "tanh"
    first_norm: bool = True
    copy: bool = False
    n_classes: int = 0
    pooling: str = "family"
    start_id: int = -1
    task_transform: bool = False
    pooler_activation: str = "tanh"
    generator_width: int = 0
    generator_layers: int = 0
