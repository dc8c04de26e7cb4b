"""OLMo 2 (OLMo Team 2024), OLMo 3 (2025) and OLMoE (Muennighoff et al. 2024).

All normalize queries and keys jointly over all heads. OLMo 2 normalizes the outputs of sublayers
instead of their inputs; OLMo 3 adds sliding windows, with unscaled RoPE in local layers;
OLMoE is a Llama with experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lm.config.registries import ClippedOptions
from lm.interop.family import UnsupportedConfig, Values, positive_number
from lm.interop.llama import (
    config_layer_types,
    decoder,
    layer_types,
    read_decoder,
    read_layer_rope,
    read_windows,
    write_decoder,
    write_layer_rope,
)
from lm.interop.qwen_moe import FEED_FORWARDS, read_experts, write_experts
from lm.models.moe import expert_width
from lm.models.transformer_config import TransformerConfig

_NORMS = {
    "post_attention_layernorm": "attention_post_norm",
    "post_feedforward_layernorm": "feed_forward_post_norm",
}
_ALWAYS: dict[str, Any] = {"qk_norm": True, "qk_norm_over": "all"}


def _read(hf: Values) -> Values:
    return read_decoder(hf) | {
        "attention_bias": "all" if hf.get("attention_bias") else "none",
    }


def _write(config: TransformerConfig) -> Values:
    return write_decoder(config) | {"attention_bias": "query" in config.attention_biases}


def _read_olmo3(hf: Values) -> Values:
    types = hf.get("layer_types") or layer_types(hf["num_hidden_layers"], 4, 3)
    flat = {key: value for key, value in hf.items() if not key.startswith("rope_")}
    return _read(flat) | read_windows(hf, types) | read_layer_rope(hf, types, 5e5, 5e5)


def _write_olmo3(config: TransformerConfig) -> Values:
    plain = {key: value for key, value in _write(config).items() if not key.startswith("rope_")}
    # transformers makes the mask of windows even where no layer has it.
    windows = {"sliding_window": config.window or 4096, "layer_types": config_layer_types(config)}
    return plain | write_layer_rope(config) | windows


def _read_olmoe(hf: Values) -> Values:
    hf = {"num_experts": hf.get("num_local_experts", 64), "num_experts_per_tok": 8} | hf
    found = _read(hf) | read_experts({"router_aux_loss_coef": 0.01} | hf)
    if (bound := hf.get("clip_qkv")) is None:
        return found
    options = ClippedOptions(positive_number("clip_qkv", bound))
    return found | {"mixer": "clipped", "mixer_options": options}


def _write_olmoe(config: TransformerConfig) -> Values:
    if config.d_model != config.n_heads * config.head_dim:
        raise UnsupportedConfig(f"model.head_dim={config.head_dim}")
    bound = config.mixer_options.qkv_clip if config.mixer == "clipped" else None
    values = {"intermediate_size": expert_width(config), "clip_qkv": bound}
    return _write(config) | write_experts(config) | values


OLMO2 = decoder("olmo2", "Olmo2", _read, _write, norms=_NORMS, norm_placement="output", **_ALWAYS)
OLMO3 = decoder(
    "olmo3",
    "Olmo3",
    _read_olmo3,
    _write_olmo3,
    norms=_NORMS,
    norm_placement="output",
    **_ALWAYS,
)
OLMOE = replace(
    decoder("olmoe", "Olmoe", _read_olmoe, _write_olmoe, feed_forward=FEED_FORWARDS, **_ALWAYS),
    classes={frozenset(): "OlmoeForCausalLM"},
    heads={},
)
