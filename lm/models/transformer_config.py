"""What a Transformer is: a value, not a class. GPT-2, Llama, BERT and T5 are values of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lm.models.init_config import InitConfig


def global_layers(n_layers: int, window: int, global_every: int) -> np.ndarray:
    """Which layers see beyond a window, [N] bool: each `global_every`-th, or all where is none."""
    numbers = np.arange(1, n_layers + 1)
    return numbers % (global_every or n_layers + 1) == 0 if window else numbers > 0


@dataclass(frozen=True)
class TransformerConfig(InitConfig):
    """A stack of Transformer blocks; the meaning of each field is in `lm/config/`."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    max_length: int
    n_decoder_layers: int = 0
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    norm_placement: str = "pre"
    norm_unit_offset: bool = False
    norm_bias: bool = True
    embedding_norm: bool = False
    bias: bool = True
    attention_bias: str = "same"
    qk_norm: bool = False
    attention_scale: float = 0.0
    attention_softcap: float = 0.0
    window: int = 0
    global_every: int = 0
    positions: str = "learned"
    position_offset: int = 0
    rope_theta: float = 10_000.0
    rope_theta_local: float = 0.0
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    rope_low_frequency: float = 1.0
    rope_high_frequency: float = 4.0
    rope_original_length: int = 8192
    relative_buckets: int = 32
    relative_max_distance: int = 128
    token_types: int = 0
    activation: str = "gelu_tanh"
    n_experts: int = 0
    experts_per_token: int = 2
    experts_every: int = 1
    expert_capacity: float = 0.0
    balance_loss: float = 0.01
    router_z_loss: float = 0.0
    router_jitter: float = 0.0
    tie_embeddings: bool = True
    scale_embeddings: bool = False
    scale_logits: bool = False
    logit_softcap: float = 0.0
    mup_base_width: int = 0
    mup_base_head_dim: int = 0
    n_classes: int = 0
    pooling: str = "family"
    dropout: float = 0.0
    final_dropout: bool = False
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    scale_residual_init: bool = True
    attention: str = "xla"
    context_attention: str = "ring"
    remat: str = "none"
    scan_unroll: int = 1
    loss_chunk: int = 0

    @property
    def pattern(self) -> int:
        """How many blocks there are before they repeat."""
        return self.experts_every if self.n_experts else 1

    @property
    def score_scale(self) -> float:
        """What products of queries and keys are multiplied by."""
        return self.attention_scale or self.head_dim**-0.5

    def is_global(self, n_layers: int) -> np.ndarray | None:
        """`global_layers` of a stack of so many; None: all are alike."""
        mixed = self.window and self.global_every
        return global_layers(n_layers, self.window, self.global_every) if mixed else None

    @property
    def query_bias(self) -> bool:
        """Whether the projections to queries, keys and values have biases."""
        return self.bias if self.attention_bias == "same" else self.attention_bias != "none"

    @property
    def attention_output_bias(self) -> bool:
        """Whether the projection of what the heads found has one."""
        return self.bias if self.attention_bias == "same" else self.attention_bias == "all"

    @property
    def width_ratio(self) -> float:
        """d_model over that of muP's base model; 1 in the standard parametrisation."""
        return self.d_model / (self.mup_base_width or self.d_model)

    @property
    def base_head_dim(self) -> int:
        """head_dim of muP's base model, or the own."""
        return self.mup_base_head_dim or self.head_dim

    @property
    def query_multiplier(self) -> float:
        """What makes of the usual scale of attention scores muP's, which falls as 1/head_dim."""
        ratio = self.base_head_dim / self.head_dim
        return ratio if self.attention_scale else ratio**0.5

    def std(self, n_in: int, n_out: int) -> float:
        """Deviation of a fresh kernel whose `n_in` inputs and `n_out` outputs grow with the width:
        in muP as 1/sqrt(inputs), from that of the base model (Yang et al. 2022, Table 8)."""
        m = self.width_ratio
        return self.stddev(n_in / m, n_out / m) / m**0.5

    def output_std(self, n_out: int) -> float:
        """The same from the residual stream to a number of scores that does not grow: in muP as in
        the base model, the scores being divided by `width_ratio` (Table 8)."""
        return self.stddev(self.d_model / self.width_ratio, n_out)

    def residual_std(self, n_in: int, n_out: int) -> float:
        """The same for projections that write to the residual stream (GPT-2 §2.3)."""
        shrink = (2 * self.n_layers) ** 0.5 if self.scale_residual_init else 1.0
        return self.std(n_in, n_out) / shrink
