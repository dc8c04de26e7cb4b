"""Llama (Touvron et al. 2023), Mistral (Jiang et al. 2023) where its window has no effect, Qwen2
(Yang et al. 2024) and Qwen3 (Yang et al. 2025): one table of tensors.

Heads are rotated in halves on both sides, so projections need no permutation.
"""

from __future__ import annotations

from lm.interop.family import Family, Inexpressible, Values, choose, demand, need
from lm.interop.mapping import linear, norm, output, same
from lm.models.config import TransformerConfig

_ATTENTION, _FEED_FORWARD = "stack/layers/attention", "stack/layers/feed_forward"

_LLAMA3 = {  # their names of what stretches the wavelengths
    "factor": "rope_factor",
    "low_freq_factor": "rope_low_frequency",
    "high_freq_factor": "rope_high_frequency",
    "original_max_position_embeddings": "rope_original_length",
}
_SCALINGS = {"default": {}, "linear": {"factor": "rope_factor"}, "llama3": _LLAMA3}


def read_rope(theirs: Values) -> Values:
    """Theta and the scaling: `rope_parameters`, or `rope_theta` and `rope_scaling` of old."""
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in _SCALINGS:
        raise Inexpressible(
            f"config.json: rope_type={kind} is not supported, only {', '.join(_SCALINGS)}"
        )
    demand(theirs | rope, partial_rotary_factor=1.0)
    theta = rope.get("rope_theta") or theirs.get("rope_theta") or 10_000.0
    found = {"rope_theta": float(theta), "rope_scaling": "none" if kind == "default" else kind}
    for name, ours in _SCALINGS[kind].items():
        value = need(rope, name)
        found[ours] = int(value) if ours == "rope_original_length" else float(value)
    return found


def write_rope(config: TransformerConfig) -> Values:
    """`rope_parameters`, with `rope_theta` and `rope_scaling` for transformers before 5."""
    kind = "default" if config.rope_scaling == "none" else config.rope_scaling
    scaling = {name: getattr(config, ours) for name, ours in _SCALINGS[kind].items()}
    parameters = {"rope_type": kind, "rope_theta": config.rope_theta} | scaling
    old = {"rope_type": kind} | scaling if scaling else None
    return {
        "rope_parameters": parameters,
        "rope_theta": config.rope_theta,
        "rope_scaling": old,
    }


def _read(theirs: Values) -> Values:
    choose(theirs, "hidden_act", {"silu": "swiglu"}, "silu")
    return read_rope(theirs) | {
        "n_kv_heads": theirs.get("num_key_value_heads") or theirs["num_attention_heads"],
        "head_dim": theirs.get("head_dim") or 0,
        "norm_eps": theirs.get("rms_norm_eps", 1e-6),
        "tie_embeddings": theirs.get("tie_word_embeddings", False),
        "attention_dropout": theirs.get("attention_dropout", 0.0),
    }


def _write(config: TransformerConfig) -> Values:
    return write_rope(config) | {
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": config.attention_dropout,
    }


def _read_llama(theirs: Values) -> Values:
    return _read(theirs) | {
        "bias": theirs.get("mlp_bias", False),
        "attention_bias": "all" if theirs.get("attention_bias") else "none",
    }


def _write_llama(config: TransformerConfig) -> Values:
    biases = {"mlp_bias": config.bias, "attention_bias": config.query_bias}
    return _write(config) | biases


def _read_mistral(theirs: Values) -> Values:
    window, longest = theirs.get("sliding_window"), theirs.get("max_position_embeddings")
    if window and longest and window < longest:
        raise Inexpressible(
            f"config.json: sliding_window={window} is below max_position_embeddings={longest}, "
            "and a window is not supported"
        )
    return _read(theirs)


def _write_mistral(config: TransformerConfig) -> Values:
    return _write(config) | {"sliding_window": None}


def _no_window(theirs: Values) -> None:
    demand(theirs, use_sliding_window=False)
    kinds = set(theirs.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        raise Inexpressible(f"config.json: layer_types {', '.join(sorted(kinds))} not supported")


def _read_qwen2(theirs: Values) -> Values:
    _no_window(theirs)
    return _read(theirs)


def _read_qwen3(theirs: Values) -> Values:
    _no_window(theirs)
    # Their default, unlike the other families', is no part of d_model.
    theirs = theirs | {"head_dim": theirs.get("head_dim") or 128}
    return _read(theirs) | {"attention_bias": "all" if theirs.get("attention_bias") else "none"}


def _write_qwen3(config: TransformerConfig) -> Values:
    return _write(config) | {"attention_bias": config.query_bias}


def _family(model_type: str, name: str, read, write, **fixed) -> Family:
    always = {
        "norm": "rmsnorm",
        "positions": "rotary",
        "activation": "swiglu",
        "bias": False,
        "norm_bias": False,
    }
    return Family(
        model_type=model_type,
        model="decoder",
        classes={frozenset(): f"{name}ForCausalLM"},
        prefix="model.",
        base=lambda _: [
            same("model.embed_tokens.weight", "tokens/embedding"),
            *norm("model.layers.{}.input_layernorm", "stack/layers/attention_norm"),
            *linear("model.layers.{}.self_attn.q_proj", f"{_ATTENTION}/query", "D", "H K"),
            *linear("model.layers.{}.self_attn.k_proj", f"{_ATTENTION}/key", "D", "G K"),
            *linear("model.layers.{}.self_attn.v_proj", f"{_ATTENTION}/value", "D", "G K"),
            *linear("model.layers.{}.self_attn.o_proj", f"{_ATTENTION}/out", "H K", "D"),
            *norm("model.layers.{}.self_attn.q_norm", f"{_ATTENTION}/query_norm"),
            *norm("model.layers.{}.self_attn.k_norm", f"{_ATTENTION}/key_norm"),
            *norm("model.layers.{}.post_attention_layernorm", "stack/layers/feed_forward_norm"),
            *linear("model.layers.{}.mlp.gate_proj", f"{_FEED_FORWARD}/gate"),
            *linear("model.layers.{}.mlp.up_proj", f"{_FEED_FORWARD}/in"),
            *linear("model.layers.{}.mlp.down_proj", f"{_FEED_FORWARD}/out"),
            *norm("model.norm", "stack/final_norm"),
            output("lm_head.weight"),
        ],
        keys={
            "num_hidden_layers": "n_layers",
            "hidden_size": "d_model",
            "num_attention_heads": "n_heads",
            "intermediate_size": "d_ff",
            "vocab_size": "vocab_size",
            "max_position_embeddings": "max_length",
        },
        fixed=always | fixed,
        read=read,
        write=write,
        output="lm_head.weight",
        table="model.embed_tokens.weight",
        ignored=[r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"],
    )


LLAMA = _family("llama", "Llama", _read_llama, _write_llama)
MISTRAL = _family("mistral", "Mistral", _read_mistral, _write_mistral, attention_bias="none")
QWEN2 = _family("qwen2", "Qwen2", _read_qwen2, _write, attention_bias="qkv")
QWEN3 = _family("qwen3", "Qwen3", _read_qwen3, _write_qwen3, qk_norm=True)
