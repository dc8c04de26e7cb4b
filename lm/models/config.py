"""What a Transformer stack is: a value, not a class. GPT-2 and Llama are values of it."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp


@dataclass(frozen=True)
class TransformerConfig:
    """A stack of Transformer blocks; the meaning of each field is in `lm/schema.py`."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    max_length: int
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    norm_placement: str = "pre"
    norm_bias: bool = True
    bias: bool = True
    positions: str = "learned"
    rope_theta: float = 10_000.0
    activation: str = "gelu_tanh"
    tie_embeddings: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    init_std: float = 0.02
    scale_residual_init: bool = True
    dtype: jnp.dtype = jnp.float32
    attention: str = "xla"
    remat: str = "none"
    scan_unroll: int = 1

    @property
    def residual_std(self) -> float:
        """Deviation of the projections that write to the residual stream (GPT-2 §2.3)."""
        return (
            self.init_std / (2 * self.n_layers) ** 0.5
            if self.scale_residual_init
            else self.init_std
        )
