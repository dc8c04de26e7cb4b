"""Mixtures of experts of Qwen2 (Yang et al. 2024) and Qwen3 (Yang et al. 2025).

Experts have their own width. Qwen2-MoE adds a shared expert, used by every token, with a sigmoid
gate. Some layers may be dense.
"""

from __future__ import annotations

from lm.interop.family import Values, read_size
from lm.interop.llama import (
    DENSE,
    FEED_FORWARD,
    GLOBAL,
    LOCAL,
    MLP,
    OLD_PREFIX,
    TASKS,
    config_layer_types,
    decoder,
    one_window,
    read_decoder,
    read_windows,
    write_decoder,
    write_one_window,
)
from lm.interop.tensor_mapping import TensorMapping, linear_mappings
from lm.models.expert_choice import has_normalized_weights
from lm.models.moe import expert_width
from lm.models.transformer_config import TransformerConfig


def gated_mappings(name: str, path: str) -> list[TensorMapping]:
    """Map the three matrices of a gated feed-forward layer."""
    parts = {"gate_proj": "gate", "up_proj": "in", "down_proj": "out"}
    return [
        row
        for hf, module in parts.items()
        for row in linear_mappings(f"{name}.{hf}", f"{path}/{module}")
    ]


FEED_FORWARDS = [
    *DENSE,
    *linear_mappings(f"{MLP}.gate", f"{FEED_FORWARD}/router"),
    *gated_mappings(f"{MLP}.experts.{{}}", f"{FEED_FORWARD}/experts"),
    *gated_mappings(f"{MLP}.shared_expert", f"{FEED_FORWARD}/shared_expert"),
    *linear_mappings(f"{MLP}.shared_expert_gate", f"{FEED_FORWARD}/shared_expert_gate"),
]


def read_experts(hf: Values) -> Values:
    """Read the experts and their router; `num_local_experts` is another name of `num_experts`."""
    n_experts = "num_experts" if hf.get("num_experts") is not None else "num_local_experts"
    return {
        "n_experts": read_size(hf, n_experts),
        "experts_per_token": read_size(hf, "num_experts_per_tok"),
        "expert_weights": "normalized" if hf.get("norm_topk_prob") else "probability",
        "balance_loss": hf.get("router_aux_loss_coef", 0.001),
    }


def write_experts(config: TransformerConfig) -> Values:
    """Write the experts and their router."""
    return {
        "num_experts": config.n_experts,
        "num_experts_per_tok": config.experts_per_token,
        "norm_topk_prob": has_normalized_weights(config),
        "router_aux_loss_coef": config.balance_loss,
    }


def sparse_layers(config: TransformerConfig) -> list[bool]:
    """Return which layers have experts."""
    return [kind.feed_forward == "experts" for kind in config.layer_types(config.n_layers)]


def read_sparse_layers(is_sparse: list[bool]) -> Values:
    """Return `dense_layers` and `experts_every`, else `expert_layers`; nothing without experts.

    Args:
        is_sparse: the layers that have experts.
    """
    numbers = [i for i, sparse in enumerate(is_sparse) if sparse]
    if not numbers:
        return {}
    every = numbers[1] - numbers[0] if numbers[1:] else 1
    first = numbers[0] - every + 1
    if first < 0 or numbers != list(range(numbers[0], len(is_sparse), every)) or not is_sparse[-1]:
        return {"expert_layers": tuple(numbers)}
    return {"dense_layers": first, "experts_every": every}


def read_qwen_experts(hf: Values) -> Values:
    """Read the experts, their width, and which layers have them."""
    n_layers, step = read_size(hf, "num_hidden_layers"), hf.get("decoder_sparse_step", 1)
    plain = {*(hf.get("mlp_only_layers") or ())}
    found = read_experts(hf) | {"expert_d_ff": read_size(hf, "moe_intermediate_size")}
    layers = read_sparse_layers(
        [i not in plain and (i + 1) % step == 0 for i in range(n_layers)]
        if found["n_experts"]
        else []
    )
    return found | layers if layers else {"n_experts": 0}


def write_qwen_experts(config: TransformerConfig) -> Values:
    """Write the experts, their width, and which layers have them."""
    plain = [i for i, sparse in enumerate(sparse_layers(config)) if not sparse]
    layers = {"decoder_sparse_step": 1, "mlp_only_layers": plain}
    return write_experts(config) | layers | {"moe_intermediate_size": expert_width(config)}


def _read_qwen2_moe(hf: Values) -> Values:
    shared = "shared_expert_intermediate_size"
    hf = {"num_experts": hf.get("num_local_experts", 60), "num_experts_per_tok": 4} | hf
    hf = {"moe_intermediate_size": 1408, shared: 5632, "max_window_layers": 28} | hf
    n_layers, used = read_size(hf, "num_hidden_layers"), hf.get("use_sliding_window", False)
    local = [used and i % 2 == 0 and i < hf["max_window_layers"] for i in range(n_layers)]
    default = [LOCAL if is_local else GLOBAL for is_local in local]
    types: Values = {"layer_types": default} | hf
    found = read_qwen_experts(hf)
    if found["n_experts"]:
        found["shared_expert_d_ff"] = read_size(hf, shared)
    biases = {"attention_bias": "qkv" if hf.get("qkv_bias", True) else "none"}
    return read_decoder(hf) | found | read_windows(hf, types["layer_types"] or default) | biases


def _write_qwen2_moe(config: TransformerConfig) -> Values:
    return (
        write_decoder(config)
        | write_qwen_experts(config)
        | {
            "shared_expert_intermediate_size": config.shared_expert_d_ff,
            "qkv_bias": "query" in config.attention_biases,
            "use_sliding_window": bool(config.window),
            "sliding_window": config.window or None,
            "layer_types": config_layer_types(config),
        }
    )


def _read_qwen3_moe(hf: Values) -> Values:
    hf = {"num_experts": hf.get("num_local_experts", 128), "num_experts_per_tok": 8} | hf
    hf = {"moe_intermediate_size": 768} | hf
    window = one_window(hf, 4096) if hf.get("use_sliding_window") else {"window": 0}
    biases = {"attention_bias": "all" if hf.get("attention_bias") else "none"}
    return read_decoder(hf) | read_qwen_experts(hf) | window | biases


def _write_qwen3_moe(config: TransformerConfig) -> Values:
    window = write_one_window(config) | {"use_sliding_window": bool(config.window)}
    biases = {"attention_bias": "query" in config.attention_biases}
    return write_decoder(config) | write_qwen_experts(config) | window | biases


QWEN2_MOE = decoder(
    "qwen2_moe",
    "Qwen2Moe",
    _read_qwen2_moe,
    _write_qwen2_moe,
    feed_forward=FEED_FORWARDS,
    heads=TASKS,
    shared_expert_gate=True,
)
QWEN3_MOE = decoder(
    "qwen3_moe",
    "Qwen3Moe",
    _read_qwen3_moe,
    _write_qwen3_moe,
    feed_forward=FEED_FORWARDS,
    heads=TASKS,
    spans_prefix=OLD_PREFIX,
    qk_norm=True,
)
