"""Qwen3-Next (Qwen team 2025): three layers of Gated DeltaNet, then one of gated attention.

Feed-forward layers are those of Qwen2-MoE. Files store the projections of a Gated DeltaNet as two
tensors, whose rows alternate between its key heads, and queries with their gates as one.
"""

from __future__ import annotations

from dataclasses import replace

from lm.config.registries import MambaOptions
from lm.interop.activation_words import ACTIVATIONS
from lm.interop.family import UnsupportedConfig, Values, lm_word, read_size
from lm.interop.llama import (
    ATTENTION,
    GLOBAL,
    OLD_PREFIX,
    TASKS,
    decoder,
    even_rotation,
    read_common,
    read_rope,
    write_common,
    write_rope,
)
from lm.interop.qwen_moe import FEED_FORWARDS, read_qwen_experts, write_qwen_experts
from lm.interop.tensor_mapping import TensorMapping, linear_mappings, same_layout
from lm.models.transformer_config import TransformerConfig

LINEAR = "linear_attention"
_SIZES = {
    "linear_num_value_heads": "ssm_heads",
    "linear_value_head_dim": "ssm_head_dim",
    "linear_num_key_heads": "ssm_groups",
    "linear_key_head_dim": "ssm_state",
    "linear_conv_kernel_dim": "ssm_conv",
}
_PARTIAL = 0.25  # of a head that is rotated


def _read_layers(hf: Values) -> Values:
    """Read which layers have attention."""
    n_layers, types = read_size(hf, "num_hidden_layers"), hf.get("layer_types")
    if types is None:
        every = read_size({"full_attention_interval": 4} | hf, "full_attention_interval")
        types = [LINEAR if (i + 1) % max(every, 1) else GLOBAL for i in range(n_layers)]
    if not {*types} <= {LINEAR, GLOBAL} or len(types) != n_layers:
        raise UnsupportedConfig(
            f"config.json: layer_types are not {LINEAR} or {GLOBAL} for each of {n_layers} layers"
        )
    return {"attention_layers": tuple(i for i, kind in enumerate(types) if kind == GLOBAL)}


def _read(hf: Values) -> Values:
    layers = _read_layers(hf)
    is_used = len(layers["attention_layers"]) < read_size(hf, "num_hidden_layers")
    sizes: Values = {field: read_size(hf, name) for name, field in _SIZES.items() if is_used}
    if is_used and (not all(sizes.values()) or sizes["ssm_heads"] % sizes["ssm_groups"]):
        raise UnsupportedConfig(f"config.json: inconsistent sizes of {LINEAR}: {sizes}")
    activation = lm_word(hf, "hidden_act", ACTIVATIONS, "silu")
    layers["mixer_options"] = MambaOptions(**sizes, ssm_conv_bias=False, ssm_activation=activation)
    rope, found = read_rope(hf, partial=_PARTIAL), read_qwen_experts(hf)
    if found["n_experts"]:
        found["shared_expert_d_ff"] = read_size(hf, "shared_expert_intermediate_size")
    biases = {"attention_bias": "all" if hf.get("attention_bias") else "none"}
    return read_common(hf) | rope | even_rotation(hf, rope) | found | biases | layers


def _write(config: TransformerConfig) -> Values:
    c = config
    o = c.mixer_options if c.mixer == "gated_delta" else MambaOptions()
    types = [GLOBAL if i in c.attention_layers else LINEAR for i in range(c.n_layers)]
    return (
        write_common(c)
        | write_rope(c, _PARTIAL)
        | write_qwen_experts(c)
        | {name: getattr(o, field) for name, field in _SIZES.items()}
        | {
            "shared_expert_intermediate_size": c.shared_expert_d_ff,
            "attention_bias": "query" in c.attention_biases,
            "layer_types": types,
        }
    )


_HF = "model.layers.{}.linear_attn"
_QUERY = "model.layers.{}.self_attn.q_proj"
_LLAMA = decoder(
    "qwen3_next",
    "Qwen3Next",
    _read,
    _write,
    feed_forward=FEED_FORWARDS,
    heads=TASKS,
    spans_prefix=OLD_PREFIX,
    mixer="gated_delta",
    norm_unit_offset=True,
    qk_norm=True,
    attention_gate=True,
    shared_expert_gate=True,
)


def _table(config: TransformerConfig) -> list[TensorMapping]:
    rows = [row for row in _LLAMA.base(config) if not row.name.startswith(_QUERY)]
    for name, hf, lm in (("weight", "(H P K) D", "D H K"), ("bias", "(H P K)", "H K")):
        kind = "kernel" if name == "weight" else name
        paths = f"{ATTENTION}/query/{kind}", f"{ATTENTION}/output_gate/{kind}"
        rows.append(TensorMapping(f"{_QUERY}.{name}", paths, hf, lm))
    for name, axes in (("q", "G N"), ("k", "G N"), ("v", "H M")):
        taps = f"{ATTENTION}/convolutions_{name}/kernel"
        rows += [
            *linear_mappings(f"{_HF}.{name}", f"{ATTENTION}/inputs_{name}", "D", axes),
            TensorMapping(f"{_HF}.{name}.taps", (taps,), f"({axes}) 1 K", f"{axes} K"),
        ]
    return [
        *rows,
        *linear_mappings(f"{_HF}.z", f"{ATTENTION}/gate", "D", "H M"),
        *linear_mappings(f"{_HF}.b", f"{ATTENTION}/rate", "D", "H"),
        *linear_mappings(f"{_HF}.a", f"{ATTENTION}/step", "D", "H"),
        same_layout(f"{_HF}.A_log", f"{ATTENTION}/log_decay"),
        same_layout(f"{_HF}.dt_bias", f"{ATTENTION}/step_bias"),
        same_layout(f"{_HF}.norm.weight", f"{ATTENTION}/scale"),
        *linear_mappings(f"{_HF}.out_proj", f"{ATTENTION}/output", "H M", "D"),
    ]


def _key_heads(config: TransformerConfig) -> int:
    return int(config.mixer_options.ssm_groups)


QWEN3_NEXT = replace(
    _LLAMA,
    base=_table,
    fused={
        f"{_HF}.in_proj_qkvz.weight": [f"{_HF}.{part}.weight" for part in "qkvz"],
        f"{_HF}.in_proj_ba.weight": [f"{_HF}.{part}.weight" for part in "ba"],
        f"{_HF}.conv1d.weight": [f"{_HF}.{part}.taps" for part in "qkv"],
    },
    alternating={
        f"{_HF}.in_proj_qkvz.weight": _key_heads,
        f"{_HF}.in_proj_ba.weight": _key_heads,
    },
)
