"""Gemma (Gemma Team 2024), Gemma 2 (2024) and the text models of Gemma 3 (2025).

Norms multiply by 1 + scale and embeddings by √d. From 2 on each sublayer has a norm on either
side, some layers have a window, and scores a scale of their own; scores and logits have soft-caps.
3 normalises queries and keys instead, and rotates its local layers by a theta of theirs.
"""

from __future__ import annotations

from typing import Any

from lm.interop.family import UnsupportedConfig, Values, choose, require_equal
from lm.interop.layer_windows import GLOBAL, LOCAL, layer_types, read_windows, types_of
from lm.interop.llama import common, decoder, read_rope, write_common, write_rope
from lm.models.transformer_config import TransformerConfig

_ALWAYS: dict[str, Any] = {
    "activation": "geglu",
    "norm_unit_offset": True,
    "scale_embeddings": True,
}
_NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attention_post_norm",
    "pre_feedforward_layernorm": "feed_forward_norm",
    "post_feedforward_layernorm": "feed_forward_post_norm",
}
_TANH = "gelu_pytorch_tanh"


def _read(theirs: Values, key: str, *, exact: bool = False) -> Values:
    # Gemma 1 was released as "gelu" and has always meant the other one.
    choose(theirs, key, {_TANH: "geglu"} | ({} if exact else {"gelu": "geglu"}), _TANH)
    require_equal(theirs, use_bidirectional_attention=False)
    biased = bool(theirs.get("attention_bias"))
    tied = theirs.get("tie_word_embeddings")
    return common(theirs) | {
        "attention_bias": "all" if biased else "none",
        "tie_embeddings": True if tied is None else tied,
    }


def _write(config: TransformerConfig) -> Values:
    activation = {"hidden_act": _TANH, "hidden_activation": _TANH}
    return write_common(config) | activation | {"attention_bias": config.query_bias}


def _read_gemma(theirs: Values) -> Values:
    return _read(theirs, "hidden_act") | read_rope(theirs)


def _write_gemma(config: TransformerConfig) -> Values:
    return _write(config) | write_rope(config)


def _read_later(theirs: Values, scores: float | None, logits: float | None, every: int) -> Values:
    """What 2 and 3 have in common; the arguments are the values of absent keys."""
    n_layers, window = theirs["num_hidden_layers"], theirs.get("sliding_window", 4096)
    types = theirs.get("layer_types") or layer_types(n_layers, window or 0, every)
    return (
        _read(theirs, "hidden_activation", exact=True)
        | read_windows(theirs | {"sliding_window": window}, types)
        | {
            "attention_scale": float(theirs.get("query_pre_attn_scalar", 256)) ** -0.5,
            "attention_softcap": float(theirs.get("attn_logit_softcapping", scores) or 0),
            "logit_softcap": float(theirs.get("final_logit_softcapping", logits) or 0),
        }
    )


def _write_later(config: TransformerConfig) -> Values:
    scalar = config.score_scale**-2
    if abs(scalar - round(scalar)) > 1e-6 * scalar:
        raise UnsupportedConfig(f"model.attention_scale={config.attention_scale}")
    if config.d_model % config.n_heads:  # their configuration refuses it
        raise UnsupportedConfig(f"model.n_heads={config.n_heads}")
    return _write(config) | {
        "layer_types": types_of(config),
        "sliding_window": config.window or None,
        "query_pre_attn_scalar": round(scalar),
        "attn_logit_softcapping": config.attention_softcap or None,
        "final_logit_softcapping": config.logit_softcap or None,
    }


def _read_gemma2(theirs: Values) -> Values:
    return _read_later(theirs, 50.0, 30.0, 2) | read_rope(theirs)


def _write_gemma2(config: TransformerConfig) -> Values:
    return _write_later(config) | write_rope(config)


def _read_gemma3(theirs: Values) -> Values:
    # Their fused attention, which Gemma 2's models never use, leaves it out without a word.
    require_equal(theirs, attn_logit_softcapping=None)
    found = _read_later(theirs, None, None, theirs.get("sliding_window_pattern") or 6)
    by_type = theirs.get("rope_parameters") or {}
    old = {"rope_theta": theirs.get("rope_theta")} | (theirs.get("rope_scaling") or {})
    far = read_rope({"rope_parameters": by_type.get(GLOBAL) or old}, 1e6)
    if not found["window"]:
        return found | far
    old = {"rope_theta": theirs.get("rope_local_base_freq")}
    near = read_rope({"rope_parameters": by_type.get(LOCAL) or old}, 1e4)
    if near == far:
        return found | far
    if near["rope_scaling"] != "none":
        raise UnsupportedConfig("config.json: scaled rotary wavelengths of local layers")
    return found | far | {"rope_theta_local": near["rope_theta"]}


def _write_gemma3(config: TransformerConfig) -> Values:
    far = write_rope(config)["rope_parameters"]
    local = {"rope_type": "default", "rope_theta": config.rope_theta_local}
    near = local if config.rope_theta_local else far
    return _write_later(config) | {"rope_parameters": {GLOBAL: far, LOCAL: near}}


GEMMA = decoder("gemma", "Gemma", _read_gemma, _write_gemma, **_ALWAYS)
GEMMA2 = decoder(
    "gemma2",
    "Gemma2",
    _read_gemma2,
    _write_gemma2,
    norms=_NORMS,
    norm_placement="both",
    **_ALWAYS,
)
GEMMA3 = decoder(
    "gemma3_text",
    "Gemma3",
    _read_gemma3,
    _write_gemma3,
    norms=_NORMS,
    norm_placement="both",
    qk_norm=True,
    **_ALWAYS,
)
