"""Gemma (Gemma Team 2024), Gemma 2 (2024) and the text models of Gemma 3 (2025).

Norms multiply by 1 + scale, embeddings by √d_model. From Gemma 2 on, every sublayer has a norm
before and after it, some layers use sliding-window attention, the attention scale is configurable,
and attention scores and logits are soft-capped. Gemma 3 has QK-norm instead of the cap on scores,
and another RoPE theta in local layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm.interop.family import (
    UnsupportedConfig,
    Values,
    positive_number,
    require_equal,
)
from lm.interop.llama import (
    TAGGER,
    config_layer_types,
    decoder,
    layer_types,
    read_common,
    read_layer_rope,
    read_rope,
    read_windows,
    write_common,
    write_layer_rope,
    write_rope,
)
from lm.models.transformer_config import TransformerConfig

_ALWAYS: dict[str, Any] = {
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


def _read(hf: Values, key: str) -> Values:
    require_equal(hf, use_bidirectional_attention=False)
    biased = bool(hf.get("attention_bias"))
    return read_common(hf | {"hidden_act": hf.get(key)}) | {
        "attention_bias": "all" if biased else "none",
    }


def _write(config: TransformerConfig) -> Values:
    written = write_common(config)
    activation = {"hidden_activation": written["hidden_act"]}
    return written | activation | {"attention_bias": "query" in config.attention_biases}


def _read_gemma(hf: Values) -> Values:
    # Besides "gelu", Gemma 1 was released with another key for its actual approximation.
    hf = hf | {"hidden_act": hf["hidden_activation"] or _TANH} if "hidden_activation" in hf else hf
    return _read(hf, "hidden_act") | read_rope(hf)


def _write_gemma(config: TransformerConfig) -> Values:
    return _write(config) | write_rope(config)


def _types(hf: Values, every: int) -> Sequence[str]:
    return hf.get("layer_types") or layer_types(hf["num_hidden_layers"], every, every - 1)


def _read_later(hf: Values, types: Sequence[str]) -> Values:
    """Read the settings shared by Gemma 2 and 3; `types` are those of the layers."""
    scalar = "query_pre_attn_scalar"
    return (
        _read(hf, "hidden_activation")
        | read_windows(hf, types)
        | {
            "attention_scale": positive_number(scalar, hf[scalar]) ** -0.5,
            "attention_softcap": _softcap(hf, "attn_logit_softcapping"),
            "logit_softcap": _softcap(hf, "final_logit_softcapping"),
        }
    )


def _softcap(hf: Values, name: str) -> float:
    value = hf[name]
    return 0.0 if value is None or value == 0 else positive_number(name, value)


def _write_later(config: TransformerConfig) -> Values:
    scalar = config.score_scale**-2
    if abs(scalar - round(scalar)) > 1e-6 * scalar:
        raise UnsupportedConfig(f"model.attention_scale={config.attention_scale}")
    if config.d_model % config.n_heads:  # Gemma2Config does not allow it
        raise UnsupportedConfig(f"model.n_heads={config.n_heads}")
    return _write(config) | {
        "layer_types": config_layer_types(config),
        # transformers makes the mask of windows even where no layer has it.
        "sliding_window": config.window or 4096,
        "query_pre_attn_scalar": round(scalar),
        "attn_logit_softcapping": config.attention_softcap or None,
        "final_logit_softcapping": config.logit_softcap or None,
    }


def _read_gemma2(hf: Values) -> Values:
    return _read_later(hf, _types(hf, 2)) | read_rope(hf)


def _write_gemma2(config: TransformerConfig) -> Values:
    return _write_later(config) | write_rope(config)


def _read_gemma3(hf: Values) -> Values:
    hf = hf | {"attn_logit_softcapping": None}  # transformers ignores it
    types = _types(hf, hf.get("sliding_window_pattern") or 6)
    return _read_later(hf, types) | read_layer_rope(hf, types, 1e6, 1e4)


def _write_gemma3(config: TransformerConfig) -> Values:
    return _write_later(config) | write_layer_rope(config)


GEMMA = decoder("gemma", "Gemma", _read_gemma, _write_gemma, heads=TAGGER, **_ALWAYS)
GEMMA2 = decoder(
    "gemma2",
    "Gemma2",
    _read_gemma2,
    _write_gemma2,
    norms=_NORMS,
    heads=TAGGER,
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
