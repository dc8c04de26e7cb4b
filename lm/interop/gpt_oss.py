"""gpt-oss (OpenAI 2025, arXiv 2508.10925).

Attention sinks, windows in every other layer, biases everywhere, experts with a clipped SwiGLU.
Files store the experts of a layer in one tensor, alternating gate and input, as released in MXFP4.
"""

from __future__ import annotations

from dataclasses import replace

from lm.interop.family import Values, read_size, require_equal
from lm.interop.llama import (
    ATTENTION,
    FEED_FORWARD,
    GLOBAL,
    LOCAL,
    MLP,
    TAGGER,
    config_layer_types,
    decoder,
    read_common,
    read_rope,
    read_windows,
    write_common,
    write_rope,
)
from lm.interop.tensor_mapping import TensorMapping, linear_mappings, same_layout
from lm.models.moe import expert_width
from lm.models.transformer_config import TransformerConfig

_OURS, _THEIRS = f"{FEED_FORWARD}/experts", f"{MLP}.experts"
_FEED_FORWARD = [
    *linear_mappings(f"{MLP}.router", f"{FEED_FORWARD}/router"),
    TensorMapping(
        f"{_THEIRS}.gate_up_proj",
        (f"{_OURS}/gate/kernel", f"{_OURS}/in/kernel"),
        "E D (F P)",
        "E D F",
    ),
    TensorMapping(
        f"{_THEIRS}.gate_up_proj_bias",
        (f"{_OURS}/gate/bias", f"{_OURS}/in/bias"),
        "E (F P)",
        "E F",
    ),
    same_layout(f"{_THEIRS}.down_proj", f"{_OURS}/out/kernel"),
    same_layout(f"{_THEIRS}.down_proj_bias", f"{_OURS}/out/bias"),
    same_layout("model.layers.{}.self_attn.sinks", f"{ATTENTION}/sinks"),
]
_WINDOW = 128
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _read(hf: Values) -> Values:
    require_equal(hf, swiglu_alpha=1.702, swiglu_limit=7.0)
    hf = {"num_local_experts": 128, "num_experts_per_tok": 4, "sliding_window": _WINDOW} | hf
    hf = {"head_dim": 64, "rope_scaling": None, "rope_parameters": None} | hf
    if hf["rope_scaling"] is None and hf["rope_parameters"] is None:
        hf["rope_parameters"] = _ROPE
    n_layers = read_size(hf, "num_hidden_layers")
    types = hf.get("layer_types") or [(LOCAL, GLOBAL)[i % 2] for i in range(n_layers)]
    return (
        read_common(hf)
        | read_rope(hf, 150_000.0)
        | read_windows(hf, types)
        | {
            "activation": "swiglu_clipped",  # whatever the file says, as in transformers
            "attention_bias": "all" if hf.get("attention_bias", True) else "none",
            "n_experts": read_size(hf, "num_local_experts"),
            "experts_per_token": read_size(hf, "num_experts_per_tok"),
            "balance_loss": hf.get("router_aux_loss_coef", 0.001),
        }
    )


def _write(config: TransformerConfig) -> Values:
    return (
        write_common(replace(config, activation="swiglu"))
        | write_rope(config)
        | {
            "intermediate_size": expert_width(config),
            "attention_bias": "query" in config.attention_biases,
            # transformers builds the window mask even if no layer uses it.
            "sliding_window": config.window or _WINDOW,
            "layer_types": config_layer_types(config),
            "num_local_experts": config.n_experts,
            "num_experts_per_tok": config.experts_per_token,
            "router_aux_loss_coef": config.balance_loss,
        }
    )


GPT_OSS = decoder(
    "gpt_oss",
    "GptOss",
    _read,
    _write,
    feed_forward=_FEED_FORWARD,
    heads=TAGGER,
    activation="swiglu_clipped",
    attention_sinks=True,
    bias=True,
    router_bias=True,
    expert_weights="normalized",
)
