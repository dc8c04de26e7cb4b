"""Text models of Llama 4 (Meta 2025).

Three of four layers attend within chunks and normalize what RoPE rotates; each fourth attends to
the whole text and has no positions. Routers weight the inputs of experts. In files, RoPE rotates
neighboring dimensions of a head, here its halves: queries and keys are permuted.
"""

from __future__ import annotations

from dataclasses import replace

from lm.interop.family import (
    Family,
    UnsupportedConfig,
    Values,
    positive_number,
    read_size,
)
from lm.interop.llama import (
    ATTENTION,
    FEED_FORWARD,
    GLOBAL,
    LOCAL,
    config_layer_types,
    decoder,
    has_rope,
    read_common,
    read_nope,
    read_rope,
    read_windows,
    write_common,
    write_nope,
    write_rope,
)
from lm.interop.qwen_moe import gated_mappings, read_sparse_layers, sparse_layers
from lm.interop.tensor_mapping import TensorMapping, linear_mappings, same_layout
from lm.models.expert_choice import has_normalized_weights
from lm.models.moe import expert_width
from lm.models.transformer_config import TransformerConfig

_CHUNKED = "chunked_attention"
_MLP, _ATTENTION = "model.layers.{}.feed_forward", "model.layers.{}.self_attn"
_EXPERTS, _THEIRS = f"{FEED_FORWARD}/experts", f"{_MLP}.experts"
_FEED_FORWARD = [
    *gated_mappings(_MLP, FEED_FORWARD),
    *gated_mappings(f"{_MLP}.shared_expert", f"{FEED_FORWARD}/shared_expert"),
    *linear_mappings(f"{_MLP}.router", f"{FEED_FORWARD}/router"),
    TensorMapping(
        f"{_THEIRS}.gate_up_proj",
        (f"{_EXPERTS}/gate/kernel", f"{_EXPERTS}/in/kernel"),
        "E D (P F)",
        "E D F",
    ),
    same_layout(f"{_THEIRS}.down_proj", f"{_EXPERTS}/out/kernel"),
]


def _rotated(name: str, path: str) -> list[TensorMapping]:
    """Map queries or keys, permuting neighboring dimensions of each head to halves."""
    return [
        TensorMapping(f"{name}.weight", (f"{path}/kernel",), "(H K 2) D", "D H (2 K)"),
        TensorMapping(f"{name}.bias", (f"{path}/bias",), "(H K 2)", "H (2 K)"),
    ]


_PERMUTED = [
    *_rotated(f"{_ATTENTION}.q_proj", f"{ATTENTION}/query"),
    *_rotated(f"{_ATTENTION}.k_proj", f"{ATTENTION}/key"),
]


def _read(hf: Values) -> Values:
    width = read_size(hf, "intermediate_size")
    found = (
        read_common(hf)
        | read_rope(hf, 500_000.0)
        | read_nope(hf)
        | _read_mixture(hf)
        | {
            "attention_bias": "all" if hf.get("attention_bias") else "none",
            "rope_norm": bool(hf.get("use_qk_norm", True)),
            "d_ff": read_size(hf, "intermediate_size_mlp"),
            "expert_d_ff": width,
            "shared_expert_d_ff": width,
        }
    )
    if hf.get("attn_temperature_tuning", True) and not all(has_rope(hf)):
        found["nope_temperature"] = positive_number("attn_scale", hf.get("attn_scale", 0.1))
        found["nope_temperature_length"] = read_size({"floor_scale": 8192} | hf, "floor_scale")
    default = [_CHUNKED if rotated else GLOBAL for rotated in has_rope(hf)]
    types = hf.get("layer_types") or default
    if LOCAL in types:
        raise UnsupportedConfig(f"config.json: layer_types has {LOCAL}")
    types = [LOCAL if kind == _CHUNKED else kind for kind in types]
    windows = read_windows(hf | {"sliding_window": hf["attention_chunk_size"]}, types)
    return found | windows | {"window_chunks": windows["window"] > 0}


def _read_mixture(hf: Values) -> Values:
    """Read the experts, their router, and which layers have them."""
    n_layers = read_size(hf, "num_hidden_layers")
    key = "interleave_moe_layer_step"
    step = int(max(1, positive_number(key, hf.get(key, 1))))
    default = list(range(step - 1, n_layers, step))
    numbers: list[int] = default if hf.get("moe_layers") is None else hf["moe_layers"]
    layers = read_sparse_layers([i in numbers for i in range(n_layers)])
    if not layers:
        return {"n_experts": 0}
    return layers | {
        "n_experts": read_size(hf, "num_local_experts"),
        "experts_per_token": read_size(hf, "num_experts_per_tok"),
        "balance_loss": hf.get("router_aux_loss_coef", 0.001),
        "router_jitter": hf.get("router_jitter_noise", 0.0),
        "expert_weights": "probability",
        "expert_weights_input": True,
        "router_scores": "sigmoid",
    }


def _write(config: TransformerConfig) -> Values:
    c, width = config, expert_width(config)
    if c.n_experts and (c.shared_expert_d_ff != width or has_normalized_weights(c)):
        raise UnsupportedConfig(f"model.shared_expert_d_ff={c.shared_expert_d_ff}")
    if c.window and not c.window_chunks:
        raise UnsupportedConfig("model.window_chunks=False")
    types = [_CHUNKED if kind == LOCAL else kind for kind in config_layer_types(c)]
    # transformers builds the chunk mask even if no layer uses it.
    written = {"attention_chunk_size": c.window or c.max_length, "layer_types": types}
    return (
        write_common(c)
        | write_rope(c)
        | written
        | {
            "intermediate_size": width,
            "intermediate_size_mlp": c.d_ff,
            "attention_bias": "query" in c.attention_biases,
            "use_qk_norm": c.rope_norm,
            "no_rope_layers": write_nope(c),
            "attn_temperature_tuning": c.nope_temperature > 0,
            "attn_scale": c.nope_temperature or 0.1,
            "floor_scale": c.nope_temperature_length,
            "moe_layers": [i for i, sparse in enumerate(sparse_layers(c)) if sparse],
            "num_local_experts": c.n_experts or 1,
            "num_experts_per_tok": c.experts_per_token if c.n_experts else 1,
            "router_aux_loss_coef": c.balance_loss,
            "router_jitter_noise": c.router_jitter,
        }
    )


def _family() -> Family:
    llama = decoder("llama4_text", "Llama4", _read, _write, feed_forward=_FEED_FORWARD)
    names = {row.name for row in _PERMUTED}

    def base(config: TransformerConfig) -> list[TensorMapping]:
        return [row for row in llama.base(config) if row.name not in names] + _PERMUTED

    return replace(llama, base=base, classes={frozenset(): "Llama4ForCausalLM"}, heads={})


LLAMA4 = _family()
