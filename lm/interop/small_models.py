"""Families that differ from Llama in a few settings: SmolLM3, Granite, Phi-3 and StableLM.

SmolLM3 (Hugging Face 2025) has no positions in every fourth layer, Granite (IBM 2024), which may
have experts, multiplies embeddings, sublayers, scores and logits, Phi-3 and Phi-4 (Microsoft 2024)
store queries, keys and values in one tensor, and StableLM (Stability AI 2024) rotates a quarter of
each head and uses LayerNorm; its 12B has parallel sublayers and normalized heads.
"""

from __future__ import annotations

from dataclasses import replace

from lm.interop.family import UnsupportedConfig, Values, positive_number, read_size
from lm.interop.llama import (
    ATTENTION,
    FEED_FORWARD,
    GLOBAL,
    LOCAL,
    MLP,
    OLD_PREFIX,
    TAGGER,
    TASKS,
    config_layer_types,
    decoder,
    even_rotation,
    has_rope,
    one_window,
    read_common,
    read_decoder,
    read_nope,
    read_rope,
    read_windows,
    write_common,
    write_decoder,
    write_nope,
    write_one_window,
    write_rope,
)
from lm.interop.tensor_mapping import TensorMapping, linear_mappings, same_layout
from lm.models.moe import expert_width
from lm.models.transformer_config import TransformerConfig

_MIXTURE = "model.layers.{}.block_sparse_moe"
_NO_PADDING = {"pad_token_id": None}  # the published default may be beyond the table
_MULTIPLIERS = {
    "embedding_multiplier": "embedding_multiplier",
    "residual_multiplier": "residual_multiplier",
    "attention_multiplier": "attention_scale",
    "logits_scaling": "logits_scaling",
}


def _read_biases(hf: Values) -> Values:
    return {
        "bias": hf.get("mlp_bias", False),
        "attention_bias": "all" if hf.get("attention_bias") else "none",
    }


def _write_biases(config: TransformerConfig) -> Values:
    return {"mlp_bias": config.bias, "attention_bias": "query" in config.attention_biases}


def _read_smollm3(hf: Values) -> Values:
    nope = read_nope(hf)
    used = bool(hf.get("use_sliding_window")) and hf.get("sliding_window") is not None
    default = [GLOBAL if rotated or not used else LOCAL for rotated in has_rope(hf)]
    types = hf.get("layer_types") or default
    return read_decoder(hf, 2e6) | _read_biases(hf) | nope | read_windows(hf, types)


def _write_smollm3(config: TransformerConfig) -> Values:
    c = config
    return (
        write_decoder(c)
        | _write_biases(c)
        | _NO_PADDING
        | {
            "no_rope_layers": write_nope(c),
            "use_sliding_window": bool(c.window),
            "sliding_window": c.window or None,
            "layer_types": config_layer_types(c),
        }
    )


def _read_granite(hf: Values) -> Values:
    factors = {
        field: positive_number(name, hf.get(name, 1.0))
        for name, field in _MULTIPLIERS.items()
        if hf.get(name, 1.0) is not None or field != "attention_scale"  # null: the usual scale
    }
    return read_decoder(hf) | _read_biases(hf) | factors


def _write_granite(config: TransformerConfig) -> Values:
    factors = {name: getattr(config, field) for name, field in _MULTIPLIERS.items()}
    factors["attention_multiplier"] = config.score_scale
    return write_decoder(config) | _write_biases(config) | factors


def _read_granite_moe(hf: Values) -> Values:
    return _read_granite(hf) | {
        "n_experts": read_size(hf, "num_local_experts"),
        "experts_per_token": read_size(hf, "num_experts_per_tok"),
        "balance_loss": hf.get("router_aux_loss_coef", 0.001),
        "bias": False,
    }


def _write_granite_moe(config: TransformerConfig) -> Values:
    written = _write_granite(config) | {
        "intermediate_size": expert_width(config),
        "num_local_experts": config.n_experts,
        "num_experts_per_tok": config.experts_per_token,
        "router_aux_loss_coef": config.balance_loss,
    }
    del written["mlp_bias"]
    return written


def _read_phi3(hf: Values) -> Values:
    """Read Phi-3; "su" and "yarn" are older names of its position scaling."""
    hf, name = dict(hf), "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    rope = hf.get(name)
    if isinstance(rope, dict):
        kind = rope.get("rope_type") or rope.get("type")
        older = {"su": "longrope", "yarn": "longrope"}
        hf[name] = rope | {"rope_type": older.get(kind, kind) if isinstance(kind, str) else kind}
    found = read_rope(hf, partial=1.0)
    return (
        read_common(hf)
        | found
        | even_rotation(hf, found)
        | one_window(hf, None)
        | {
            "dropout": hf.get("resid_pdrop", 0.0),
        }
    )


def _write_phi3(config: TransformerConfig) -> Values:
    c = config
    if c.rope_scaling not in ("none", "longrope"):
        raise UnsupportedConfig(f"model.rope_scaling={c.rope_scaling}")
    if c.head_dim * c.n_heads != c.d_model and c.rope_scaling != "none":
        raise UnsupportedConfig(f"model.head_dim={c.head_dim}")  # Phi3Config rejects its factors
    lengths = {"original_max_position_embeddings": c.rope_original_length}
    return (
        write_decoder(c)
        | write_one_window(c)
        | (lengths if c.rope_scaling == "longrope" else {})
        | _NO_PADDING
        | {"resid_pdrop": c.dropout}
    )


def _read_stablelm(hf: Values) -> Values:
    return (
        read_common(hf)
        | read_rope(hf, partial=0.25)
        | {
            "head_dim": 0,
            "norm_eps": hf.get("layer_norm_eps", 1e-5),
            "attention_bias": "qkv" if hf.get("use_qkv_bias") else "none",
            "dropout": hf.get("hidden_dropout", 0.0),
            "residual": "parallel" if hf.get("use_parallel_residual") else "sum",
            "qk_norm": bool(hf.get("qk_layernorm")),
        }
    )


def _write_stablelm(config: TransformerConfig) -> Values:
    written = write_common(config) | write_rope(config, 0.25)
    del written["rms_norm_eps"], written["head_dim"]
    return written | {
        "layer_norm_eps": config.norm_eps,
        "use_qkv_bias": "query" in config.attention_biases,
        "hidden_dropout": config.dropout,
        "use_parallel_residual": config.residual == "parallel",
        "qk_layernorm": config.qk_norm,
    }


SMOLLM3 = decoder(
    "smollm3", "SmolLM3", _read_smollm3, _write_smollm3, heads=TASKS, spans_prefix=OLD_PREFIX
)
GRANITE = decoder("granite", "Granite", _read_granite, _write_granite, heads=())
GRANITE_MOE = decoder(
    "granitemoe",
    "GraniteMoe",
    _read_granite_moe,
    _write_granite_moe,
    heads=(),
    expert_weights="normalized",
    feed_forward=[
        *linear_mappings(f"{_MIXTURE}.router.layer", f"{FEED_FORWARD}/router"),
        TensorMapping(
            f"{_MIXTURE}.input_linear.weight",
            tuple(f"{FEED_FORWARD}/experts/{part}/kernel" for part in ("gate", "in")),
            "E (P F) D",
            "E D F",
        ),
        TensorMapping(
            f"{_MIXTURE}.output_linear.weight",
            (f"{FEED_FORWARD}/experts/out/kernel",),
            "E D F",
            "E F D",
        ),
    ],
)
PHI3 = replace(
    decoder("phi3", "Phi3", _read_phi3, _write_phi3, heads=TAGGER, attention_bias="none"),
    fused={
        "model.layers.{}.self_attn.qkv_proj.weight": [
            f"model.layers.{{}}.self_attn.{part}_proj.weight" for part in "qkv"
        ],
        f"{MLP}.gate_up_proj.weight": [f"{MLP}.gate_proj.weight", f"{MLP}.up_proj.weight"],
    },
)
STABLELM = decoder(
    "stablelm",
    "StableLm",
    _read_stablelm,
    _write_stablelm,
    heads=TAGGER,
    norm="layernorm",
    norm_bias=True,
    qk_norm_over="each_head",
    head_norms=[
        same_layout(
            f"model.layers.{{}}.self_attn.{part}_layernorm.norms.{{}}.weight",
            f"{ATTENTION}/{name}_norm/scale",
        )
        for part, name in (("q", "query"), ("k", "key"))
    ],
)
