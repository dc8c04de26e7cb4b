"""DeepSeek-V2 (DeepSeek-AI 2024a) and DeepSeek-V3 (2024b), whose architecture Kimi K2 shares.

Multi-head latent attention; a few dense layers, then experts with a shared one, chosen from the
best groups of experts. V2 scores experts by a softmax, V3 by sigmoids and a bias, which is model
state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lm.config.registries import LatentAttentionOptions
from lm.interop.family import (
    Family,
    UnsupportedConfig,
    Values,
    lm_word,
    positive_number,
    read_size,
    require_equal,
)
from lm.interop.llama import DENSE, FEED_FORWARD, MLP, TAGGER, decoder, read_decoder, write_decoder
from lm.interop.qwen_moe import gated_mappings
from lm.interop.tensor_mapping import (
    TensorMapping,
    linear_mappings,
    norm_mappings,
    output_mapping,
    same_layout,
)
from lm.models.expert_choice import has_normalized_weights
from lm.models.moe import expert_width
from lm.models.transformer_config import TransformerConfig
from lm.models.variables import MODEL_STATE

_OURS, _THEIRS = "stack/layers/attention", "model.layers.{}.self_attn"
_SIZES = {  # of every head, and of latents
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
BIAS_RATE = 1e-3  # DeepSeek-V3 (2024b, §4.2); not in config.json


def _table(config: TransformerConfig) -> list[TensorMapping]:
    if config.mixer_options.q_lora_rank:
        queries = [
            *linear_mappings(f"{_THEIRS}.q_a_proj", f"{_OURS}/query_down"),
            *norm_mappings(f"{_THEIRS}.q_a_layernorm", f"{_OURS}/query_norm"),
            *linear_mappings(f"{_THEIRS}.q_b_proj", f"{_OURS}/query", "D", "H K"),
        ]
    else:
        queries = linear_mappings(f"{_THEIRS}.q_proj", f"{_OURS}/query", "D", "H K")
    bias = f"{MODEL_STATE}/{FEED_FORWARD}/router_bias"
    experts = gated_mappings(f"{MLP}.experts.{{}}", f"{FEED_FORWARD}/experts")
    return [
        same_layout("model.embed_tokens.weight", "tokens/embedding"),
        *queries,
        *linear_mappings(f"{_THEIRS}.kv_a_proj_with_mqa", f"{_OURS}/down"),
        *norm_mappings(f"{_THEIRS}.kv_a_layernorm", f"{_OURS}/norm"),
        *linear_mappings(f"{_THEIRS}.kv_b_proj", f"{_OURS}/up", "D", "H K"),
        *linear_mappings(f"{_THEIRS}.o_proj", f"{_OURS}/out", "H K", "D"),
        *norm_mappings("model.layers.{}.input_layernorm", "stack/layers/attention_norm"),
        *norm_mappings(
            "model.layers.{}.post_attention_layernorm", "stack/layers/feed_forward_norm"
        ),
        *DENSE,
        *linear_mappings(f"{MLP}.gate", f"{FEED_FORWARD}/router"),
        same_layout(f"{MLP}.gate.e_score_correction_bias", bias),
        *(row for row in experts if row.name.endswith(".weight")),
        *gated_mappings(f"{MLP}.shared_experts", f"{FEED_FORWARD}/shared_expert"),
        *norm_mappings("model.norm", "stack/final_norm"),
        output_mapping("lm_head.weight"),
    ]


def _read_attention(hf: Values, interleaved: bool) -> Values:
    """Read the sizes of latent attention; missing keys get the defaults of V2 and V3."""
    sizes = {name: read_size({name: default} | hf, name) for name, default in _SIZES.items()}
    rank = {"q_lora_rank": 1536} | hf
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    mscale = rope.get("mscale_all_dim") if isinstance(rope, dict) else None
    head_dim = sizes.pop("qk_rope_head_dim")
    options = LatentAttentionOptions(
        q_lora_rank=0 if rank["q_lora_rank"] is None else read_size(rank, "q_lora_rank"),
        rope_interleaved=interleaved,
        mscale_all_dim=positive_number("mscale_all_dim", mscale) if mscale else 0.0,
        **sizes,
    )
    heads = read_size(hf, "num_attention_heads")
    if heads // (hf.get("num_key_value_heads") or heads) > 1:  # read there only to repeat keys
        require_equal(hf, num_key_value_heads=heads)
    if min(head_dim, *sizes.values()) < 1:
        raise UnsupportedConfig(
            f"config.json: dimensions of heads and latents must be above 0: {sizes}"
        )
    biases = "all" if hf.get("attention_bias") else "none"
    return {
        "mixer_options": options,
        "head_dim": head_dim,
        "n_kv_heads": heads,
        "attention_bias": biases,
    }


def _read_mixture(hf: Values, grouped: bool) -> Values:
    """Read the experts and their router."""
    require_equal(hf, moe_layer_freq=1)
    n_layers, dense = read_size(hf, "num_hidden_layers"), read_size(hf, "first_k_dense_replace")
    if dense >= n_layers:
        return {"n_experts": 0}
    n_shared = read_size(hf, "n_shared_experts") if hf.get("n_shared_experts") else 0
    width = read_size(hf, "moe_intermediate_size")
    groups = (read_size(hf, "n_group"), read_size(hf, "topk_group")) if grouped else (1, 1)
    n_experts = read_size(hf, "n_routed_experts")
    found = {
        "dense_layers": dense,
        "n_experts": n_experts,
        "experts_per_token": read_size(hf, "num_experts_per_tok"),
        "expert_d_ff": width,
        "shared_expert_d_ff": n_shared * width,
        "expert_weights_scale": positive_number(
            "routed_scaling_factor", hf["routed_scaling_factor"]
        ),
    }
    n_groups, n_chosen = groups
    if n_groups == n_chosen:
        return found
    is_cut = n_groups and n_experts % n_groups == 0 and 1 <= n_chosen <= n_groups
    if not is_cut or found["experts_per_token"] > n_chosen * (n_experts // n_groups):
        raise UnsupportedConfig(
            f"config.json: {found['experts_per_token']} of {n_experts} experts cannot be chosen "
            f"from {n_chosen} of {n_groups} groups"
        )
    return found | {"expert_groups": n_groups, "expert_groups_per_token": n_chosen}


def _write(config: TransformerConfig) -> Values:
    c, written = config, write_decoder(config)
    o = c.mixer_options if c.mixer == "mla" else LatentAttentionOptions()
    if o.mscale_all_dim and c.rope_scaling != "none":
        for name in ("rope_parameters", "rope_scaling"):
            written[name] |= {"mscale_all_dim": o.mscale_all_dim}
    sizes = {name: getattr(o, name) for name in _SIZES if name != "qk_rope_head_dim"}
    layers: Values = {"first_k_dense_replace": c.n_layers}
    if c.n_experts:
        layers = _write_mixture(c)
    return (
        written
        | sizes
        | layers
        | {
            "q_lora_rank": o.q_lora_rank or None,
            "qk_rope_head_dim": c.head_dim,
            "attention_bias": "query" in c.attention_biases,
        }
    )


def _write_mixture(config: TransformerConfig) -> Values:
    c, width = config, expert_width(config)
    if c.shared_expert_d_ff % width:
        raise UnsupportedConfig(f"model.shared_expert_d_ff={c.shared_expert_d_ff}")
    return {
        "first_k_dense_replace": c.dense_layers,
        "n_routed_experts": c.n_experts,
        "n_shared_experts": c.shared_expert_d_ff // width,
        "num_experts_per_tok": c.experts_per_token,
        "moe_intermediate_size": width,
        "n_group": c.expert_groups or 1,
        "topk_group": c.expert_groups_per_token or 1,
        "routed_scaling_factor": c.expert_weights_scale,
        "norm_topk_prob": has_normalized_weights(c),
    }


def _read_v2(hf: Values) -> Values:
    hf = {
        "first_k_dense_replace": 0,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "moe_intermediate_size": 1407,
        "routed_scaling_factor": 1.0,
    } | hf
    require_equal(hf, scoring_func="softmax")
    methods = {"greedy": "experts", "group_limited_greedy": "groups"}
    method = lm_word(hf, "topk_method", methods, "greedy")
    return (
        read_decoder(hf)
        | {"bias": hf.get("mlp_bias", False)}
        | _read_attention(hf, True)
        | _read_mixture(hf, method == "groups")
        | {"expert_weights": "probability"}
    )


def _write_v2(config: TransformerConfig) -> Values:
    method = "group_limited_greedy" if config.expert_groups else "greedy"
    return _write(config) | {"topk_method": method, "mlp_bias": config.bias}


def _read_v3(hf: Values) -> Values:
    hf = {
        "first_k_dense_replace": 3,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
    } | hf
    require_equal(hf, scoring_func="sigmoid", topk_method="noaux_tc")
    interleaved = hf.get("rope_interleave", True)
    found = _read_mixture(hf, True)
    if found["n_experts"]:
        normalized = hf.get("norm_topk_prob", True)
        found |= {
            "expert_weights": "normalized" if normalized else "probability",
            "router_scores": "sigmoid",
            "router_bias_rate": BIAS_RATE,
            "expert_group_best": 2,
        }
    return read_decoder(hf) | _read_attention(hf, bool(interleaved)) | found


def _write_v3(config: TransformerConfig) -> Values:
    return _write(config) | {
        "rope_interleave": getattr(config.mixer_options, "rope_interleaved", True),
        "num_nextn_predict_layers": 0,
    }


def _family(
    model_type: str,
    name: str,
    read: Callable[[Values], Values],
    write: Callable[[TransformerConfig], Values],
    **fixed: Any,
) -> Family:
    found = decoder(model_type, name, read, write, mixer="mla", **fixed)
    return replace(found, base=_table, zeros=["/experts/.*/bias$"])


DEEPSEEK_V2 = _family("deepseek_v2", "DeepseekV2", _read_v2, _write_v2)
DEEPSEEK_V3 = _family("deepseek_v3", "DeepseekV3", _read_v3, _write_v3, heads=TAGGER)
