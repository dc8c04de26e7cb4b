"""T5 (Raffel et al. 2020), T5 1.1 (Shazeer 2020), mT5 (Xue et al. 2021), UMT5 (Chung et al. 2023).

All layers of a stack share the relative position bias, stored in the first layer; in UMT5 each has
its own. In classes for tasks the decoder reads the text as in BART, or is left out. T5 1.1 differs
in config.json by `tie_word_embeddings: false` only, which since transformers 5 means unscaled
logits; whether the embeddings are tied follows from the tensors of the file. mT5 never scales them,
UMT5 always.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lm.interop.activation_words import T5_ACTIVATIONS
from lm.interop.bart import HEADS, read_start, write_start
from lm.interop.family import (
    Family,
    Head,
    Values,
    hf_word,
    lm_word,
    read_size,
    require_equal,
)
from lm.interop.tensor_mapping import (
    TensorMapping,
    linear_mappings,
    norm_mappings,
    output_mapping,
    same_layout,
)
from lm.kernels.elementwise import GATED
from lm.models.transformer_config import TransformerConfig


def _attention(name: str, path: str) -> list[TensorMapping]:
    return [
        *linear_mappings(f"{name}.q", f"{path}/query", "D", "H K"),
        *linear_mappings(f"{name}.k", f"{path}/key", "D", "H K"),
        *linear_mappings(f"{name}.v", f"{path}/value", "D", "H K"),
        *linear_mappings(f"{name}.o", f"{path}/out", "H K", "D"),
    ]


def _stack(stack: str, feed_forward: int, gated: bool, ours: str = "") -> list[TensorMapping]:
    """Map the tensors of "encoder" or "decoder", whose sublayers have numbers."""
    ours = ours or stack
    path, block = f"{ours}/layers", f"{stack}.block.{{}}.layer"
    bias = ".layer.0.SelfAttention.relative_attention_bias.weight"
    dense = f"{block}.{feed_forward}.DenseReluDense"
    return [
        *_attention(f"{block}.0.SelfAttention", f"{path}/attention"),
        same_layout(f"{stack}.block.0{bias}", f"{ours}/relative_bias/embedding"),
        same_layout(f"{stack}.block.{{}}{bias}", f"{path}/relative_bias/embedding"),
        *norm_mappings(f"{block}.0.layer_norm", f"{path}/attention_norm"),
        *linear_mappings(f"{dense}.wi_0", f"{path}/feed_forward/gate"),
        *linear_mappings(f"{dense}.wi_1" if gated else f"{dense}.wi", f"{path}/feed_forward/in"),
        *linear_mappings(f"{dense}.wo", f"{path}/feed_forward/out"),
        *norm_mappings(f"{block}.{feed_forward}.layer_norm", f"{path}/feed_forward_norm"),
        *norm_mappings(f"{stack}.final_layer_norm", f"{ours}/final_norm"),
    ]


def _read(hf: Values) -> Values:
    scaled = hf.get("scale_decoder_outputs", hf.get("tie_word_embeddings", True))
    return read_start(hf) | {
        "n_decoder_layers": hf.get("num_decoder_layers") or hf["num_layers"],
        "relative_buckets": hf.get("relative_attention_num_buckets", 32),
        "relative_max_distance": hf.get("relative_attention_max_distance", 128),
        "norm_eps": hf.get("layer_norm_epsilon", 1e-6),
        "activation": lm_word(hf, "feed_forward_proj", T5_ACTIVATIONS, "relu"),
        "tie_embeddings": True,
        "scale_logits": scaled,
        "dropout": hf.get("dropout_rate", 0.1),
        "attention_dropout": hf.get("dropout_rate", 0.1),
        "activation_dropout": hf.get("dropout_rate", 0.1),
    }


def _write(config: TransformerConfig) -> Values:
    scaled = config.tie_embeddings and config.scale_logits
    return write_start(config) | {
        "num_decoder_layers": config.n_decoder_layers or config.n_layers,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_max_distance,
        "layer_norm_epsilon": config.norm_eps,
        "feed_forward_proj": hf_word(config.activation, T5_ACTIVATIONS, "activation"),
        "tie_word_embeddings": scaled,
        "dropout_rate": config.dropout,
        "is_encoder_decoder": True,
    }


def _base(config: TransformerConfig) -> list[TensorMapping]:
    gated, cross = config.activation in GATED, "decoder.block.{}.layer.1"
    return [
        same_layout("shared.weight", "tokens/embedding"),
        *_stack("encoder", 1, gated),
        *_stack("decoder", 2, gated),
        *_attention(f"{cross}.EncDecAttention", "decoder/layers/cross_attention"),
        *norm_mappings(f"{cross}.layer_norm", "decoder/layers/cross_attention_norm"),
        output_mapping("lm_head.weight"),
    ]


def _classes(name: str) -> dict[str, Any]:
    """Return the classes with an encoder and a decoder."""
    return {
        "classes": {
            frozenset(): f"{name}ForConditionalGeneration",
            frozenset({"pooler", "classes"}): f"{name}ForSequenceClassification",
            frozenset({"spans"}): f"{name}ForQuestionAnswering",
        }
    }


T5 = Family(
    model_type="t5",
    model="encoder_decoder",
    **_classes("T5"),
    heads=HEADS | {"classes": replace(HEADS["classes"], prefix="transformer.")},
    prefix="",
    base=_base,
    keys={
        "num_layers": "n_layers",
        "d_model": "d_model",
        "num_heads": "n_heads",
        "d_kv": "head_dim",
        "d_ff": "d_ff",
        "vocab_size": "vocab_size",
    },
    fixed={
        "norm": "rmsnorm",
        "positions": "relative",
        "bias": False,
        "norm_bias": False,
        "attention_scale": 1.0,
        "max_length": 512,
        "final_dropout": True,
        "pooling": "shifted",
    },
    read=_read,
    write=_write,
    output="lm_head.weight",
    table="shared.weight",
    copies={
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    },
    in_file=["tie_embeddings"],
    # The released files of 1.0 contain this table, which no model uses.
    ignored=[
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    ],
)


def _read_mt5(hf: Values) -> Values:
    return _read({"feed_forward_proj": "gated-gelu", **hf}) | {"scale_logits": False}


MT5 = replace(
    T5,
    model_type="mt5",
    **_classes("MT5"),
    read=_read_mt5,
    write=lambda config: _write(config) | {"tie_word_embeddings": False},
)


def _read_umt5(hf: Values) -> Values:
    # The class scales logits whatever config.json says, those of a matrix of their own too.
    scale = {"scale_logits": False, "logits_scaling": read_size(hf, "d_model") ** 0.5}
    return _read(hf) | scale


UMT5 = replace(
    T5,
    model_type="umt5",
    **_classes("UMT5"),
    read=_read_umt5,
    write=lambda config: _write(config) | {"tie_word_embeddings": True},
    fixed={**T5.fixed, "relative_per_layer": True},
)


def _encoder(family: Family, name: str) -> Family:
    """Return the family of the classes that have the encoder alone."""

    def read(hf: Values) -> Values:
        require_equal(hf, is_decoder=False)
        both = ("n_decoder_layers", "start_id")
        return {field: value for field, value in family.read(hf).items() if field not in both}

    tags = tuple(linear_mappings("classifier", "classifier"))
    return replace(
        family,
        model="encoder",
        classes={
            frozenset(): f"{name}EncoderModel",
            frozenset({"classes"}): f"{name}ForTokenClassification",
        },
        heads={"classes": Head(("classifier",), tags, replaces_output=True, prefix="transformer.")},
        base=lambda config: [
            same_layout("shared.weight", "tokens/embedding"),
            *_stack("encoder", 1, config.activation in GATED, "stack"),
        ],
        fixed={**family.fixed, "pooling": "family"},
        read=read,
        write=lambda config: family.write(config) | {"is_encoder_decoder": False},
    )


ENCODERS = {
    family.model_type: _encoder(family, name)
    for family, name in ((T5, "T5"), (MT5, "MT5"), (UMT5, "UMT5"))
}
