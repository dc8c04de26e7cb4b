"""Llama (Touvron et al. 2023) and its relatives: one table of tensors.

Mistral (Jiang et al. 2023) has a window, Mixtral (Jiang et al. 2024) experts with tensors of their
own, Qwen2 (Yang et al. 2024) biases, Qwen3 (Yang et al. 2025) normalised queries and keys. Heads
are rotated in halves on both sides, so projections need no permutation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lm.interop.family import Family, UnsupportedConfig, Values, choose, require, require_equal
from lm.interop.layer_windows import GLOBAL, LOCAL, read_windows, types_of
from lm.interop.tensor_mapping import TensorMapping, linear, norm, output, same
from lm.models.transformer_config import TransformerConfig

_ATTENTION, _FEED_FORWARD = "stack/layers/attention", "stack/layers/feed_forward"
_MLP, _EXPERTS = "model.layers.{}.mlp", "model.layers.{}.block_sparse_moe"
_NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "feed_forward_norm",
}
_DENSE = [
    *linear(f"{_MLP}.gate_proj", f"{_FEED_FORWARD}/gate"),
    *linear(f"{_MLP}.up_proj", f"{_FEED_FORWARD}/in"),
    *linear(f"{_MLP}.down_proj", f"{_FEED_FORWARD}/out"),
]
_OF_EXPERTS = [
    *linear(f"{_EXPERTS}.gate", f"{_FEED_FORWARD}/router"),
    *linear(f"{_EXPERTS}.experts.{{}}.w1", f"{_FEED_FORWARD}/experts/gate"),
    *linear(f"{_EXPERTS}.experts.{{}}.w3", f"{_FEED_FORWARD}/experts/in"),
    *linear(f"{_EXPERTS}.experts.{{}}.w2", f"{_FEED_FORWARD}/experts/out"),
]

_LLAMA3 = {  # their names of what stretches the wavelengths
    "factor": "rope_factor",
    "low_freq_factor": "rope_low_frequency",
    "high_freq_factor": "rope_high_frequency",
    "original_max_position_embeddings": "rope_original_length",
}
_SCALINGS = {"default": {}, "linear": {"factor": "rope_factor"}, "llama3": _LLAMA3}


def read_rope(theirs: Values, theta: float = 10_000.0) -> Values:
    """Theta and the scaling: `rope_parameters`, or `rope_theta` and `rope_scaling` of old."""
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in _SCALINGS:
        raise UnsupportedConfig(
            f"config.json: rope_type={kind} is not supported, only {', '.join(_SCALINGS)}"
        )
    require_equal(theirs | rope, partial_rotary_factor=1.0)
    theta = rope.get("rope_theta") or theirs.get("rope_theta") or theta
    found = {"rope_theta": float(theta), "rope_scaling": "none" if kind == "default" else kind}
    for name, ours in _SCALINGS[kind].items():
        value = require(rope, name)
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


def common(theirs: Values) -> Values:
    """What the configurations of all these families say in the same words."""
    return {
        "n_kv_heads": theirs.get("num_key_value_heads") or theirs["num_attention_heads"],
        "head_dim": theirs.get("head_dim") or 0,
        "norm_eps": theirs.get("rms_norm_eps", 1e-6),
        "attention_dropout": theirs.get("attention_dropout", 0.0),
    }


def write_common(config: TransformerConfig) -> Values:
    return {
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": config.attention_dropout,
    }


def _read(theirs: Values, theta: float = 10_000.0) -> Values:
    choose(theirs, "hidden_act", {"silu": "swiglu"}, "silu")
    tied = theirs.get("tie_word_embeddings", False)
    return common(theirs) | read_rope(theirs, theta) | {"tie_embeddings": tied}


def _write(config: TransformerConfig) -> Values:
    return write_common(config) | write_rope(config) | {"hidden_act": "silu"}


def _read_llama(theirs: Values) -> Values:
    return _read(theirs) | {
        "bias": theirs.get("mlp_bias", False),
        "attention_bias": "all" if theirs.get("attention_bias") else "none",
    }


def _write_llama(config: TransformerConfig) -> Values:
    biases = {"mlp_bias": config.bias, "attention_bias": config.query_bias}
    return _write(config) | biases


def _one_window(theirs: Values, otherwise: int | None) -> Values:
    """That of all layers; an absent key is not null."""
    return {"window": theirs.get("sliding_window", otherwise) or 0}


def _write_window(config: TransformerConfig) -> Values:
    if GLOBAL in types_of(config) and config.window:
        raise UnsupportedConfig(f"model.global_every={config.global_every}")
    return {"sliding_window": config.window or None}


def _read_mistral(theirs: Values) -> Values:
    return _read(theirs) | _one_window(theirs, 4096)


def _write_mistral(config: TransformerConfig) -> Values:
    return _write(config) | _write_window(config)


def _read_mixtral(theirs: Values) -> Values:
    if theirs.get("num_experts_per_tok", 2) < 2:
        raise UnsupportedConfig("config.json: num_experts_per_tok=1 is weighted by 1 there")
    return (
        _read(theirs, 1e6)
        | _one_window(theirs, None)
        | {
            "n_experts": theirs.get("num_local_experts", 8),
            "experts_per_token": theirs.get("num_experts_per_tok", 2),
            "balance_loss": theirs.get("router_aux_loss_coef", 0.001),
            "router_jitter": theirs.get("router_jitter_noise", 0.0),
            "norm_eps": theirs.get("rms_norm_eps", 1e-5),
        }
    )


def _write_mixtral(config: TransformerConfig) -> Values:
    return _write_mistral(config) | {
        "num_local_experts": config.n_experts,
        "num_experts_per_tok": config.experts_per_token,
        "router_aux_loss_coef": config.balance_loss,
        "router_jitter_noise": config.router_jitter,
    }


def _windows(theirs: Values) -> Values:
    """Of Qwen: every layer after the first few, if any."""
    n_layers, first = require(theirs, "num_hidden_layers"), theirs.get("max_window_layers", 28)
    used = theirs.get("use_sliding_window", False)
    types = [LOCAL if used and i >= first else GLOBAL for i in range(n_layers)]
    return read_windows(theirs, theirs.get("layer_types") or types)


def _write_windows(config: TransformerConfig) -> Values:
    return {
        "use_sliding_window": bool(config.window),
        "sliding_window": config.window or None,
        "max_window_layers": 0 if config.window else config.n_layers,
        "layer_types": types_of(config),
    }


def _read_qwen2(theirs: Values) -> Values:
    return _read(theirs) | _windows(theirs)


def _write_qwen2(config: TransformerConfig) -> Values:
    return _write(config) | _write_windows(config)


def _read_qwen3(theirs: Values) -> Values:
    # Their default, unlike the other families', is no part of d_model.
    theirs = theirs | {"head_dim": theirs.get("head_dim") or 128}
    biases = "all" if theirs.get("attention_bias") else "none"
    return _read(theirs) | _windows(theirs) | {"attention_bias": biases}


def _write_qwen3(config: TransformerConfig) -> Values:
    return _write_qwen2(config) | {"attention_bias": config.query_bias}


def decoder(
    model_type: str,
    name: str,
    read: Callable[[Values], Values],
    write: Callable[[TransformerConfig], Values],
    *,
    norms: Mapping[str, str] = _NORMS,
    feed_forward: Sequence[TensorMapping] = _DENSE,
    **fixed: object,
) -> Family:
    """A family with Llama's table, `norms` of its layers and a `feed_forward` aside."""
    always = {
        "norm": "rmsnorm",
        "positions": "rotary",
        "activation": "swiglu",
        "bias": False,
        "norm_bias": False,
    }
    of_norms = [norm(f"model.layers.{{}}.{n}", f"stack/layers/{ours}") for n, ours in norms.items()]
    attention = "model.layers.{}.self_attn"
    return Family(
        model_type=model_type,
        model="decoder",
        classes={frozenset(): f"{name}ForCausalLM"},
        prefix="model.",
        base=lambda _: [
            same("model.embed_tokens.weight", "tokens/embedding"),
            *linear(f"{attention}.q_proj", f"{_ATTENTION}/query", "D", "H K"),
            *linear(f"{attention}.k_proj", f"{_ATTENTION}/key", "D", "G K"),
            *linear(f"{attention}.v_proj", f"{_ATTENTION}/value", "D", "G K"),
            *linear(f"{attention}.o_proj", f"{_ATTENTION}/out", "H K", "D"),
            *norm(f"{attention}.q_norm", f"{_ATTENTION}/query_norm"),
            *norm(f"{attention}.k_norm", f"{_ATTENTION}/key_norm"),
            *(row for rows in of_norms for row in rows),
            *feed_forward,
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


LLAMA = decoder("llama", "Llama", _read_llama, _write_llama)
MISTRAL = decoder("mistral", "Mistral", _read_mistral, _write_mistral, attention_bias="none")
MIXTRAL = decoder(
    "mixtral",
    "Mixtral",
    _read_mixtral,
    _write_mixtral,
    feed_forward=_OF_EXPERTS,
    attention_bias="none",
)
QWEN2 = decoder("qwen2", "Qwen2", _read_qwen2, _write_qwen2, attention_bias="qkv")
QWEN3 = decoder("qwen3", "Qwen3", _read_qwen3, _write_qwen3, qk_norm=True)
