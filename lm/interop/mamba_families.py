"""Mamba-2 (Dao and Gu 2024), and Bamba (IBM 2024), which also has attention layers.

Files store the projections of a layer's gate, inputs and steps as one tensor, and the convolutions
of its inputs as another.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf, nan
from typing import Any

from lm.config.model_rules import rotary_width
from lm.config.registries import MambaOptions
from lm.errors import UserError
from lm.interop.activation_words import ACTIVATIONS
from lm.interop.family import (
    Family,
    UnsupportedConfig,
    Values,
    hf_word,
    lm_word,
    positive_number,
    read_size,
    require_equal,
)
from lm.interop.llama import (
    FEED_FORWARD,
    decoder,
    even_rotation,
    read_common,
    read_rope,
    write_decoder,
)
from lm.interop.qwen_moe import gated_mappings
from lm.interop.tensor_mapping import (
    TensorMapping,
    linear_mappings,
    norm_mappings,
    output_mapping,
    same_layout,
)
from lm.models.transformer_config import TransformerConfig

_OURS = "stack/layers/attention"
_INFINITY = {"__float__": "Infinity"}  # as transformers writes it: JSON has none
_INPUTS = {"x": "H M", "B": "G N", "C": "G N"}


def _mixer(hf: str) -> list[TensorMapping]:
    """Return the tensor table of a layer's mixer, whose name in files is `hf`."""
    projections = [
        *linear_mappings(f"{hf}.gate", f"{_OURS}/gate", "D", "H M"),
        *linear_mappings(f"{hf}.step", f"{_OURS}/step", "D", "H"),
    ]
    for name, axes in _INPUTS.items():
        ours = f"{_OURS}/convolutions_{name}"
        projections += [
            *linear_mappings(f"{hf}.{name}", f"{_OURS}/inputs_{name}", "D", axes),
            TensorMapping(f"{hf}.{name}.taps", (f"{ours}/kernel",), f"({axes}) 1 K", f"{axes} K"),
            TensorMapping(f"{hf}.{name}.tap_bias", (f"{ours}/bias",), f"({axes})", axes),
        ]
    return [
        *projections,
        same_layout(f"{hf}.A_log", f"{_OURS}/log_decay"),
        same_layout(f"{hf}.D", f"{_OURS}/skip"),
        same_layout(f"{hf}.dt_bias", f"{_OURS}/step_bias"),
        TensorMapping(f"{hf}.norm.weight", (f"{_OURS}/scale",), "(H M)", "H M"),
        *linear_mappings(f"{hf}.out_proj", f"{_OURS}/output", "H M", "D"),
    ]


def _fused(hf: str) -> dict[str, list[str]]:
    """Return the tensors of `_mixer` that a file stores as one."""
    parts = {
        "in_proj.weight": [f"{part}.weight" for part in ("gate", *_INPUTS, "step")],
        "in_proj.bias": [f"{part}.bias" for part in ("gate", *_INPUTS, "step")],
        "conv1d.weight": [f"{part}.taps" for part in _INPUTS],
        "conv1d.bias": [f"{part}.tap_bias" for part in _INPUTS],
    }
    return {f"{hf}.{name}": [f"{hf}.{part}" for part in own] for name, own in parts.items()}


def _read_mixer(hf: Values, names: dict[str, str], bias: str, conv_bias: str) -> Values:
    """Read the mixer; `names` maps sizes in config.json to their fields, the others are keys."""
    sizes = {field: read_size(hf, name) for name, field in names.items()}
    if not all(sizes.values()) or sizes["ssm_heads"] % sizes["ssm_groups"] or sizes["ssm_conv"] < 2:
        raise UnsupportedConfig(f"config.json: inconsistent sizes of Mamba-2: {sizes}")
    low, high = _step_limits(hf.get("time_step_limit"))
    options = MambaOptions(
        **sizes,
        ssm_bias=bool(hf.get(bias)),
        ssm_conv_bias=bool(hf[conv_bias]),
        ssm_activation=lm_word(hf, "hidden_act", ACTIVATIONS, "silu"),
        ssm_step_low=low,
        ssm_step_high=high,
    )
    return {"mixer_options": options}


def _step_limits(value: Any) -> tuple[float, float]:
    """Return the limits of step sizes, of which 0 is none, from `time_step_limit`."""
    if value is None:
        return 0.0, 0.0
    low, high = value if isinstance(value, list | tuple) and len(value) == 2 else (nan, nan)
    if high in (None, inf, _INFINITY):
        high = 0.0
    for limit in (low, high):
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 <= limit < inf:
            raise UserError(f"config.json: time_step_limit={value!r:.60} are not two numbers")
    if high and low > high:
        raise UserError(f"config.json: time_step_limit={value!r:.60} are not in order")
    return float(low), float(high)


def _write_step_limits(o: MambaOptions) -> Values:
    limits = [o.ssm_step_low, o.ssm_step_high or _INFINITY]
    return {"time_step_limit": limits} if o.ssm_step_low or o.ssm_step_high else {}


def _options(config: TransformerConfig) -> MambaOptions:
    return config.mixer_options if config.mixer == "mamba2" else MambaOptions()


_SIZES = {
    "num_heads": "ssm_heads",
    "head_dim": "ssm_head_dim",
    "state_size": "ssm_state",
    "n_groups": "ssm_groups",
    "conv_kernel": "ssm_conv",
    "chunk_size": "ssm_chunk",
}
_DEFAULTS = {
    "num_heads": 128,
    "head_dim": 64,
    "state_size": 128,
    "n_groups": 8,
    "conv_kernel": 4,
    "chunk_size": 256,
    "use_conv_bias": True,
}


def _read_mamba2(hf: Values) -> Values:
    hf = _DEFAULTS | hf
    found = _read_mixer(hf, _SIZES, "use_bias", "use_conv_bias")
    o = found["mixer_options"]
    width = positive_number("hidden_size", hf.get("hidden_size"))
    require_equal({"expand": 2} | hf, expand=o.ssm_heads * o.ssm_head_dim / width)
    return found | {
        "norm_eps": hf.get("layer_norm_epsilon", 1e-5),
        "tie_embeddings": hf.get("tie_word_embeddings", False),
    }


def _write_mamba2(config: TransformerConfig) -> Values:
    if config.feed_forward or config.attention_layers:
        raise UnsupportedConfig(f"model.feed_forward={config.feed_forward}")
    o = _options(config)
    expand = o.ssm_heads * o.ssm_head_dim / config.d_model
    sizes = {name: getattr(o, field) for name, field in _SIZES.items()}
    return (
        sizes
        | _write_step_limits(o)
        | {
            "expand": int(expand) if expand == int(expand) else expand,
            "layer_norm_epsilon": config.norm_eps,
            "tie_word_embeddings": config.tie_embeddings,
            "hidden_act": hf_word(o.ssm_activation, ACTIVATIONS, "ssm_activation"),
            "use_bias": o.ssm_bias,
            "use_conv_bias": o.ssm_conv_bias,
        }
    )


_ALWAYS: dict[str, Any] = {
    "mixer": "mamba2",
    "norm": "rmsnorm",
    "norm_bias": False,
    "bias": False,
}
_MIXER2 = "backbone.layers.{}.mixer"
MAMBA2 = Family(
    model_type="mamba2",
    model="decoder",
    classes={frozenset(): "Mamba2ForCausalLM"},
    prefix="backbone.",
    base=lambda _: [
        same_layout("backbone.embeddings.weight", "tokens/embedding"),
        *norm_mappings("backbone.layers.{}.norm", "stack/layers/attention_norm"),
        *_mixer(_MIXER2),
        *norm_mappings("backbone.norm_f", "stack/final_norm"),
        output_mapping("lm_head.weight"),
    ],
    keys={"num_hidden_layers": "n_layers", "hidden_size": "d_model", "vocab_size": "vocab_size"},
    fixed=_ALWAYS
    | {"positions": "none", "feed_forward": False, "n_heads": 1, "d_ff": 1, "max_length": 1},
    read=_read_mamba2,
    write=_write_mamba2,
    output="lm_head.weight",
    table="backbone.embeddings.weight",
    fused=_fused(_MIXER2),
)


_BAMBA_SIZES = {
    "mamba_n_heads": "ssm_heads",
    "mamba_d_head": "ssm_head_dim",
    "mamba_d_state": "ssm_state",
    "mamba_n_groups": "ssm_groups",
    "mamba_d_conv": "ssm_conv",
    "mamba_chunk_size": "ssm_chunk",
}
_BAMBA_DEFAULTS = {
    "mamba_n_heads": 128,
    "mamba_d_head": "auto",
    "mamba_d_state": 256,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 256,
    "mamba_expand": 2,
    "mamba_proj_bias": False,
    "mamba_conv_bias": True,
}


def _read_bamba(hf: Values) -> Values:
    hf = _BAMBA_DEFAULTS | hf
    width = read_size(hf, "mamba_expand") * read_size(hf, "hidden_size")
    if hf["mamba_d_head"] == "auto":
        hf["mamba_d_head"] = width // max(1, read_size(hf, "mamba_n_heads"))
    found = _read_mixer(hf, _BAMBA_SIZES, "mamba_proj_bias", "mamba_conv_bias")
    o, layers = found["mixer_options"], hf.get("attn_layer_indices") or []
    require_equal({"width": o.ssm_heads * o.ssm_head_dim}, width=width)
    n_layers = read_size(hf, "num_hidden_layers")
    if not isinstance(layers, list) or not {*layers} <= {*range(n_layers)}:
        raise UnsupportedConfig(f"config.json: attn_layer_indices={layers}")
    # The half rotates whatever the file says, as in transformers.
    rope = read_rope(hf, partial=0.5) | {"rope_fraction": 0.5}
    return (
        read_common(hf)
        | rope
        | even_rotation(hf, rope)
        | found
        | {
            "attention_layers": tuple(layers),
            "bias": hf.get("mlp_bias", False),
            "attention_bias": "all" if hf.get("attention_bias") else "none",
        }
    )


def _with_odd_rotation(config: TransformerConfig) -> TransformerConfig:
    """Return the configuration that `even_rotation` read, if half of a head is an odd number."""
    width = config.head_dim // 2
    if width % 2 == 0 or rotary_width(config) != width + 1:
        return config
    theta = float(f"{config.rope_theta ** (width / (width + 1)):.12g}")
    return replace(config, rope_fraction=0.5, rope_theta=theta)


def _write_bamba(config: TransformerConfig) -> Values:
    c, o = _with_odd_rotation(config), _options(config)
    expand = o.ssm_heads * o.ssm_head_dim / c.d_model
    if expand != int(expand) or c.rope_fraction != 0.5:
        raise UnsupportedConfig(f"model.rope_fraction={c.rope_fraction}, {expand} d_model")
    return (
        write_decoder(c)
        | {name: getattr(o, field) for name, field in _BAMBA_SIZES.items()}
        | _write_step_limits(o)
        | {
            "mamba_expand": int(expand),
            "mamba_proj_bias": o.ssm_bias,
            "mamba_conv_bias": o.ssm_conv_bias,
            "attn_layer_indices": [int(i) for i in c.attention_layers],
            "mlp_bias": c.bias,
            "attention_bias": "query" in c.attention_biases,
        }
    )


_BAMBA_MIXER = "model.layers.{}.mamba"
_LLAMA = decoder(
    "bamba",
    "Bamba",
    _read_bamba,
    _write_bamba,
    norms={"input_layernorm": "attention_norm", "pre_ff_layernorm": "feed_forward_norm"},
    feed_forward=gated_mappings("model.layers.{}.feed_forward", FEED_FORWARD),
    mixer="mamba2",
)


def _bamba_table(config: TransformerConfig) -> list[TensorMapping]:
    rows = [
        replace(row, name=row.name.replace("model.norm.", "model.final_layernorm."))
        for row in _LLAMA.base(config)
    ]
    return [*rows, *_mixer(_BAMBA_MIXER)]


BAMBA = replace(
    _LLAMA,
    classes={frozenset(): "BambaForCausalLM"},
    heads={},
    base=_bamba_table,
    fused=_fused(_BAMBA_MIXER),
)
