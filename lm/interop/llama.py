"""Llama (Touvron et al. 2023) and the families that share its tensor table.

Mistral (Jiang et al. 2023) adds sliding-window attention, Mixtral (Jiang et al. 2024) experts,
Qwen2 (Yang et al. 2024) query, key and value biases, Qwen3 (Yang et al. 2025) QK-norm. Both
libraries' RoPE rotates halves of a head, so that projections need no permutation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

from lm.interop.activation_words import GATED_ACTIVATIONS
from lm.interop.family import (
    Family,
    UnsupportedConfig,
    Values,
    decoder_heads,
    hf_word,
    lm_word,
    positive_number,
    read_size,
    require,
    require_equal,
)
from lm.interop.tensor_mapping import (
    TensorMapping,
    linear_mappings,
    norm_mappings,
    output_mapping,
    same_layout,
)
from lm.models.layer_patterns import global_layers, nope_layers
from lm.models.moe import expert_width
from lm.models.transformer_config import TransformerConfig

LOCAL, GLOBAL = "sliding_attention", "full_attention"
ATTENTION, FEED_FORWARD = "stack/layers/attention", "stack/layers/feed_forward"
MLP, _EXPERTS = "model.layers.{}.mlp", "model.layers.{}.block_sparse_moe"
_NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "feed_forward_norm",
}
_ATTENTION = "model.layers.{}.self_attn"
_HEAD_NORMS = [
    *norm_mappings(f"{_ATTENTION}.q_norm", f"{ATTENTION}/query_norm"),
    *norm_mappings(f"{_ATTENTION}.k_norm", f"{ATTENTION}/key_norm"),
]
DENSE = [
    *linear_mappings(f"{MLP}.gate_proj", f"{FEED_FORWARD}/gate"),
    *linear_mappings(f"{MLP}.up_proj", f"{FEED_FORWARD}/in"),
    *linear_mappings(f"{MLP}.down_proj", f"{FEED_FORWARD}/out"),
]
_OF_EXPERTS = [
    *linear_mappings(f"{_EXPERTS}.gate", f"{FEED_FORWARD}/router"),
    *linear_mappings(f"{_EXPERTS}.experts.{{}}.w1", f"{FEED_FORWARD}/experts/gate"),
    *linear_mappings(f"{_EXPERTS}.experts.{{}}.w3", f"{FEED_FORWARD}/experts/in"),
    *linear_mappings(f"{_EXPERTS}.experts.{{}}.w2", f"{FEED_FORWARD}/experts/out"),
]

_LINEAR = {"factor": "rope_factor"}  # fields by key of `rope_parameters`
_ORIGINAL = "original_max_position_embeddings"
_SCALINGS: Mapping[str, Mapping[str, str]] = {  # by rope_type
    "default": {},
    "linear": _LINEAR,
    "dynamic": _LINEAR,  # relative to max_position_embeddings
    "llama3": _LINEAR
    | {"low_freq_factor": "rope_low_frequency", "high_freq_factor": "rope_high_frequency"}
    | {_ORIGINAL: "rope_original_length"},
    "yarn": _LINEAR
    | {"beta_slow": "rope_low_frequency", "beta_fast": "rope_high_frequency"}
    | {_ORIGINAL: "rope_original_length", "truncate": "rope_truncate"},
    "longrope": _LINEAR
    | {"short_factor": "rope_short_factor", "long_factor": "rope_long_factor"}
    | {_ORIGINAL: "rope_original_length"},
}


def layer_types(n_layers: int, global_every: int, first: int) -> list[str]:
    """Return `layer_types` of config.json: layer `first` and each n-th after it are global."""
    return [GLOBAL if i % global_every == first else LOCAL for i in range(n_layers)]


def config_layer_types(config: TransformerConfig) -> list[str]:
    """Return `layer_types` of config.json for a TransformerConfig."""
    is_global_N = global_layers(config, config.n_layers)
    return [GLOBAL if is_global else LOCAL for is_global in is_global_N]


def read_windows(hf: Values, types: Sequence[str]) -> Values:
    """Return `window` and which layers ignore it, for layers of these types.

    Raises:
        UnsupportedConfig: there are other types, or not one for each layer.
    """
    n_layers = require(hf, "num_hidden_layers")
    if not {*types} <= {LOCAL, GLOBAL} or len(types) != n_layers:
        raise UnsupportedConfig(
            f"config.json: layer_types are not {LOCAL} or {GLOBAL} for each of {n_layers} layers"
        )
    if LOCAL not in types:
        return {"window": 0}
    is_first = types[0] == GLOBAL
    key = every_nth([kind == GLOBAL for kind in types[is_first:]], "global_every", "global_layers")
    if is_first and "global_every" in key:
        key |= {"global_first": True, "global_every": key["global_every"] or n_layers}
    elif is_first:
        key = {"global_layers": tuple(i for i, kind in enumerate(types) if kind == GLOBAL)}
    return {"window": read_size(hf, "sliding_window")} | key


def every_nth(marked: Sequence[bool], every: str, layers: str) -> Values:
    """Return the field `every` if every n-th layer is marked (0: none), else `layers`."""
    numbers = tuple(i for i, is_marked in enumerate(marked) if is_marked)
    n = numbers[0] + 1 if numbers else len(marked) + 1
    if numbers != tuple(range(n - 1, len(marked), n)):
        return {layers: numbers}
    return {every: n if numbers else 0}


def has_rope(hf: Values) -> list[bool]:
    """Return which layers have positions; `no_rope_layers` has 0 for all others."""
    n_layers = read_size(hf, "num_hidden_layers")
    every = read_size(hf, "no_rope_layer_interval") or n_layers + 1
    found = hf.get("no_rope_layers") or [(i + 1) % every for i in range(n_layers)]
    if len(found) < n_layers:
        raise UnsupportedConfig(f"config.json: no_rope_layers has not {n_layers} layers")
    return [bool(rotated) for rotated in found[:n_layers]]


def read_nope(hf: Values) -> Values:
    """Read which layers have no positions."""
    return every_nth([not rotated for rotated in has_rope(hf)], "nope_every", "nope_layers")


def write_nope(config: TransformerConfig) -> list[int]:
    """Return `no_rope_layers` for config.json."""
    return [int(not nope) for nope in nope_layers(config, config.n_layers)]


def read_rope(hf: Values, theta: float = 10_000.0, partial: float | None = None) -> Values:
    """Read RoPE theta and scaling: `rope_theta`, `rope_scaling`, or the later `rope_parameters`.

    Args:
        hf: config.json.
        theta: default theta.
        partial: default fraction of a head that is rotated; None: always all of it.
    """
    rope = hf.get("rope_scaling") or hf.get("rope_parameters")  # as in transformers
    rope = {} if rope is None else rope
    if not isinstance(rope, dict):
        raise UnsupportedConfig(f"config.json: the RoPE settings {rope} are not an object")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise UnsupportedConfig(
            f"config.json: rope_type={kind} is not supported, only {', '.join(_SCALINGS)}"
        )
    name = "partial_rotary_factor"
    fraction = rope.get(name, hf.get(name))
    thetas = (rope.get("rope_theta"), hf.get("rope_theta"), theta)
    theta = next(theta for theta in thetas if theta is not None)
    found: Values = {"rope_theta": positive_number("rope_theta", theta)}
    if partial is None:
        require_equal({name: fraction}, partial_rotary_factor=1.0)
    else:
        found["rope_fraction"] = partial if fraction is None else positive_number(name, fraction)
    found["rope_scaling"] = "none" if kind == "default" else kind
    longest = hf.get("max_position_embeddings")
    originals = (hf.get(_ORIGINAL), rope.get(_ORIGINAL), longest)
    original = next((length for length in originals if length is not None), None)
    rope = {key: value for key, value in rope.items() if value is not None}
    rope |= {_ORIGINAL: original}
    if kind == "yarn":
        rope = {"beta_slow": 1, "beta_fast": 32, "truncate": True} | rope
    if kind in ("yarn", "longrope"):
        if "factor" not in rope:
            longest = positive_number("max_position_embeddings", longest)
            rope["factor"] = longest / positive_number(_ORIGINAL, original)
        found["rope_attention_factor"] = _attention_factor(rope)
    if kind == "dynamic":
        found["rope_original_length"] = longest
    for name, field in _SCALINGS[kind].items():
        value = require(rope, name)
        if field in ("rope_short_factor", "rope_long_factor"):
            value = value if isinstance(value, list | tuple) else [value]
            found[field] = tuple(positive_number(name, factor) for factor in value)
        elif field == "rope_original_length":
            found[field] = int(positive_number(name, value))
        elif field == "rope_truncate":
            found[field] = value
        else:
            found[field] = positive_number(name, value)
    return found


def even_rotation(hf: Values, found: Values) -> Values:
    """Return the part of a head, and the theta, that rotate as an odd number of dimensions does.

    transformers then rotates one more, at the frequencies of the odd number.
    """
    head = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    width = int(head * found["rope_fraction"])
    if width % 2 == 0 or found["rope_scaling"] in ("yarn", "dynamic"):
        return {}
    # Two dimensions have one frequency, 1, whatever theta is.
    theta = found["rope_theta"] ** ((width + 1) / width if width > 1 else 1)
    return {"rope_fraction": (width + 1) / head, "rope_theta": theta}


def _attention_factor(rope: Values) -> float:
    """Return `rope_attention_factor` of YaRN or LongRoPE; 0 if it follows from the factor."""
    if "attention_factor" in rope:
        return positive_number("attention_factor", rope["attention_factor"])
    if not (rope.get("mscale") and rope.get("mscale_all_dim")):
        return 0.0
    growth = 0.1 * math.log(max(1.0, positive_number("factor", rope["factor"])))
    above, below = (positive_number(key, rope[key]) for key in ("mscale", "mscale_all_dim"))
    return (above * growth + 1) / (below * growth + 1)


def write_rope(config: TransformerConfig, partial_default: float = 1.0) -> Values:
    """Write `rope_parameters`, and `rope_theta` and `rope_scaling` for transformers before 5.

    Args:
        config: configuration.
        partial_default: part of a head that the class rotates unless config.json says it.
    """
    kind = "default" if config.rope_scaling == "none" else config.rope_scaling
    scaling = {name: getattr(config, field) for name, field in _SCALINGS[kind].items()}
    if kind in ("yarn", "longrope") and config.rope_attention_factor:
        scaling["attention_factor"] = config.rope_attention_factor
    partial = (
        {"partial_rotary_factor": config.rope_fraction}
        if config.rope_fraction != partial_default
        else {}
    )
    parameters = {"rope_type": kind, "rope_theta": config.rope_theta} | scaling | partial
    old = {"rope_type": kind} | scaling if scaling else None
    lengths = {"max_position_embeddings": config.rope_original_length} if kind == "dynamic" else {}
    return {
        "rope_parameters": parameters,
        "rope_theta": config.rope_theta,
        "rope_scaling": old,
        **lengths,
        **partial,
    }


def read_layer_rope(
    hf: Values, types: Collection[str], far_theta: float, near_theta: float
) -> Values:
    """Read RoPE of global ("far") and local ("near") layers: `rope_parameters` by layer type.

    Older files have `rope_theta` and `rope_scaling` for global layers, and `rope_local_base_freq`
    for local ones.

    Args:
        hf: config.json.
        types: types of the layers.
        far_theta: theta of global layers where it is missing.
        near_theta: theta of local layers where it is missing.
    """
    by_type = {} if hf.get("rope_parameters") is None else hf["rope_parameters"]
    if not isinstance(by_type, dict):
        raise UnsupportedConfig(f"config.json: the RoPE settings {by_type} are not an object")
    lengths = {"max_position_embeddings": hf.get("max_position_embeddings")}

    def read(kind: str, older: Values, theta: float, key: str) -> Values:
        rope = (by_type.get(kind) or {}) | older
        rope.pop("truncate", None)  # transformers does not find it here
        return read_rope(lengths | {"rope_parameters": rope}, hf.get(key) or theta)

    far = read(GLOBAL, hf.get("rope_scaling") or {}, far_theta, "rope_theta")
    near = read(LOCAL, {}, near_theta, "rope_local_base_freq")
    if near == far or LOCAL not in types:
        return far
    if GLOBAL not in types:
        return near
    if near["rope_scaling"] != "none":
        raise UnsupportedConfig(
            f"config.json: rope_parameters of {LOCAL} layers have another rope_type than default, "
            "which is not supported unless all layers have it"
        )
    return far | {"rope_theta_local": near["rope_theta"]}


def write_layer_rope(config: TransformerConfig) -> Values:
    """Write `rope_parameters` by layer type."""
    rope = write_rope(config)
    far = rope["rope_parameters"]
    local = {"rope_type": "default", "rope_theta": config.rope_theta_local}
    near = local if config.rope_theta_local else far
    del rope["rope_theta"], rope["rope_scaling"]
    return rope | {"rope_parameters": {GLOBAL: far, LOCAL: near}}


def read_common(hf: Values) -> Values:
    """Read the settings shared by all these families."""
    return {
        "n_kv_heads": hf.get("num_key_value_heads") or hf["num_attention_heads"],
        "head_dim": hf.get("head_dim") or 0,
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "attention_dropout": hf.get("attention_dropout", 0.0),
        "activation": lm_word(hf, "hidden_act", GATED_ACTIVATIONS, "silu"),
        "tie_embeddings": hf.get("tie_word_embeddings", False),
    }


def write_common(config: TransformerConfig) -> Values:
    """Write the settings shared by all these families."""
    return {
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": config.attention_dropout,
        "hidden_act": hf_word(config.activation, GATED_ACTIVATIONS, "activation"),
    }


def read_decoder(hf: Values, theta: float = 10_000.0) -> Values:
    """Read the settings of a decoder with one RoPE theta."""
    return read_common(hf) | read_rope(hf, theta)


def write_decoder(config: TransformerConfig) -> Values:
    """Write the settings of a decoder with one RoPE theta."""
    return write_common(config) | write_rope(config)


def _read_llama(hf: Values) -> Values:
    return read_decoder(hf) | {
        "bias": hf.get("mlp_bias", False),
        "attention_bias": "all" if hf.get("attention_bias") else "none",
    }


def _write_llama(config: TransformerConfig) -> Values:
    biases = {"mlp_bias": config.bias, "attention_bias": "query" in config.attention_biases}
    return write_decoder(config) | biases


def one_window(hf: Values, otherwise: int | None) -> Values:
    """Read the window of all layers; a missing key means `otherwise`, null no window."""
    return {"window": hf.get("sliding_window", otherwise) or 0}


def write_one_window(config: TransformerConfig) -> Values:
    """Write the window of all layers.

    Raises:
        UnsupportedConfig: only some layers have a window.
    """
    if GLOBAL in config_layer_types(config) and config.window:
        raise UnsupportedConfig(f"model.global_every={config.global_every}")
    return {"sliding_window": config.window or None}


def _read_mistral(hf: Values) -> Values:
    return read_decoder(hf) | one_window(hf, 4096)


def _write_mistral(config: TransformerConfig) -> Values:
    return write_decoder(config) | write_one_window(config)


def _read_mixtral(hf: Values) -> Values:
    hf = {"num_experts_per_tok": 2, "num_local_experts": 8} | hf
    return (
        read_decoder(hf, 1e6)
        | one_window(hf, None)
        | {
            "n_experts": read_size(hf, "num_local_experts"),
            "experts_per_token": read_size(hf, "num_experts_per_tok"),
            "balance_loss": hf.get("router_aux_loss_coef", 0.001),
            "router_jitter": hf.get("router_jitter_noise", 0.0),
            "norm_eps": hf.get("rms_norm_eps", 1e-5),
        }
    )


def _write_mixtral(config: TransformerConfig) -> Values:
    return _write_mistral(config) | {
        "intermediate_size": expert_width(config),
        "num_local_experts": config.n_experts,
        "num_experts_per_tok": config.experts_per_token,
        "router_aux_loss_coef": config.balance_loss,
        "router_jitter_noise": config.router_jitter,
    }


def _windows(hf: Values) -> Values:
    """Read Qwen's windows, which layers from `max_window_layers` on have."""
    n_layers, first = require(hf, "num_hidden_layers"), hf.get("max_window_layers", 28)
    used = hf.get("use_sliding_window", False)
    types = [LOCAL if used and i >= first else GLOBAL for i in range(n_layers)]
    return read_windows(hf, hf.get("layer_types") or types)


def _write_windows(config: TransformerConfig) -> Values:
    return {
        "use_sliding_window": bool(config.window),
        "sliding_window": config.window or None,
        "max_window_layers": 0 if config.window else config.n_layers,
        "layer_types": config_layer_types(config),
    }


def _read_qwen2(hf: Values) -> Values:
    return read_decoder(hf) | _windows(hf)


def _write_qwen2(config: TransformerConfig) -> Values:
    return write_decoder(config) | _write_windows(config)


def _read_qwen3(hf: Values) -> Values:
    # Qwen3Config's default does not depend on d_model.
    hf = hf | {"head_dim": hf.get("head_dim") or 128}
    biases = "all" if hf.get("attention_bias") else "none"
    return read_decoder(hf) | _windows(hf) | {"attention_bias": biases}


def _write_qwen3(config: TransformerConfig) -> Values:
    return _write_qwen2(config) | {"attention_bias": "query" in config.attention_biases}


def decoder(
    model_type: str,
    name: str,
    read: Callable[[Values], Values],
    write: Callable[[TransformerConfig], Values],
    *,
    norms: Mapping[str, str] = _NORMS,
    feed_forward: Sequence[TensorMapping] = DENSE,
    head_norms: Sequence[TensorMapping] = _HEAD_NORMS,
    heads: Collection[str] = ("classes",),
    spans_prefix: str = "",
    **fixed: object,
) -> Family:
    """Build a family with Llama's tensor table.

    Args:
        model_type: value in config.json.
        name: prefix of the class name.
        read: fields of TransformerConfig from config.json.
        write: values of config.json from a TransformerConfig.
        norms: norm of a block by tensor name.
        feed_forward: tensor table of the feed-forward sublayer.
        head_norms: tensor table of the norms of queries and keys.
        heads: heads that have a class; for these and `spans_prefix` see `decoder_heads`.
        spans_prefix: prefix of the stack's tensors in the class of "spans".
        **fixed: additional fields with a fixed value in this family.
    """
    always = {
        "norm": "rmsnorm",
        "positions": "rotary",
        "activation": "swiglu",
        "bias": False,
        "norm_bias": False,
    }
    of_norms = [
        norm_mappings(f"model.layers.{{}}.{n}", f"stack/layers/{module}")
        for n, module in norms.items()
    ]
    own_heads, classes = decoder_heads(f"{name}ForCausalLM", heads, spans_prefix)
    return Family(
        model_type=model_type,
        model="decoder",
        classes=classes,
        prefix="model.",
        heads=own_heads,
        base=lambda _: [
            same_layout("model.embed_tokens.weight", "tokens/embedding"),
            *linear_mappings(f"{_ATTENTION}.q_proj", f"{ATTENTION}/query", "D", "H K"),
            *linear_mappings(f"{_ATTENTION}.k_proj", f"{ATTENTION}/key", "D", "G K"),
            *linear_mappings(f"{_ATTENTION}.v_proj", f"{ATTENTION}/value", "D", "G K"),
            *linear_mappings(f"{_ATTENTION}.o_proj", f"{ATTENTION}/out", "H K", "D"),
            *head_norms,
            *(row for rows in of_norms for row in rows),
            *feed_forward,
            *norm_mappings("model.norm", "stack/final_norm"),
            output_mapping("lm_head.weight"),
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


TAGGER = ("classes", "tags")
TASKS = ("classes", "tags", "spans")
OLD_PREFIX = "transformer."

LLAMA = decoder("llama", "Llama", _read_llama, _write_llama, heads=TASKS, spans_prefix=OLD_PREFIX)
MISTRAL = decoder(
    "mistral", "Mistral", _read_mistral, _write_mistral, heads=TASKS, attention_bias="none"
)
MIXTRAL = decoder(
    "mixtral",
    "Mixtral",
    _read_mixtral,
    _write_mixtral,
    feed_forward=_OF_EXPERTS,
    attention_bias="none",
    expert_weights="normalized",
    heads=TASKS,
)
QWEN2 = decoder(
    "qwen2",
    "Qwen2",
    _read_qwen2,
    _write_qwen2,
    heads=TASKS,
    spans_prefix=OLD_PREFIX,
    attention_bias="qkv",
)
QWEN3 = decoder(
    "qwen3",
    "Qwen3",
    _read_qwen3,
    _write_qwen3,
    heads=TASKS,
    spans_prefix=OLD_PREFIX,
    qk_norm=True,
)
