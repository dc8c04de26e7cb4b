"""Configuration of a stack's mixtures of experts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Experts of a stack and their router; fields are documented in `lm/config/keys.py`."""

    n_experts: int = 0
    experts_per_token: int = 2
    experts_every: int = 1
    expert_layers: tuple[float, ...] = ()
    dense_layers: int = 0
    expert_d_ff: int = 0
    expert_weights: str = "auto"
    expert_weights_scale: float = 1.0
    expert_weights_input: bool = False
    expert_groups: int = 0
    expert_groups_per_token: int = 0
    expert_group_best: int = 1
    shared_expert_d_ff: int = 0
    shared_expert_gate: bool = False
    expert_capacity: float = 0.0
    balance_loss: float = 0.01
    router_scores: str = "softmax"
    router_z_loss: float = 0.0
    router_bias: bool = False
    router_jitter: float = 0.0
    router_bias_rate: float = 0.0
