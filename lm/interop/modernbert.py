"""ModernBERT (Warner et al. 2024), bare or with the heads of its classes.

Files store queries, keys and values as one matrix, and so the two input projections of the gated
feed-forward, with the activated one first.
"""

from __future__ import annotations

from dataclasses import replace

from lm.interop.activation_words import ACTIVATIONS, GATED_ACTIVATIONS
from lm.interop.family import (
    Family,
    Head,
    UnsupportedConfig,
    Values,
    hf_word,
    lm_word,
    positive_number,
    read_size,
    require_equal,
    states_class,
)
from lm.interop.llama import (
    config_layer_types,
    layer_types,
    read_layer_rope,
    read_windows,
    write_layer_rope,
)
from lm.interop.tensor_mapping import (
    TensorMapping,
    linear_mappings,
    norm_mappings,
    output_mapping,
    same_layout,
)
from lm.kernels.elementwise import output_activation
from lm.models.transformer_config import TransformerConfig

_SPECIAL_IDS = tuple(f"{role}_token_id" for role in ("pad", "bos", "eos", "cls", "sep"))
_TRANSFORM, _MASKED, _TAGS = "transform", "masked", "tags"
_LAYERS, _LAYER = "stack/layers", "model.layers.{}"
# These have the same names of tensors: `architectures` of config.json tells.
_TASKS = {
    frozenset({_TRANSFORM, "classes"}): "ModernBertForSequenceClassification",
    frozenset({_TRANSFORM, _TAGS}): "ModernBertForTokenClassification",
    frozenset({_TRANSFORM, "spans"}): "ModernBertForQuestionAnswering",
}
_POOLINGS = {"cls": "family", "mean": "mean"}


def _fused(name: str, paths: list[str], n_out: str) -> list[TensorMapping]:
    """Map a PyTorch linear layer that concatenates several of ours."""
    kernels, biases = (tuple(f"{_LAYERS}/{p}/{leaf}" for p in paths) for leaf in ("kernel", "bias"))
    return [
        TensorMapping(f"{_LAYER}.{name}.weight", kernels, f"(P {n_out}) D", f"D {n_out}"),
        TensorMapping(f"{_LAYER}.{name}.bias", biases, f"(P {n_out})", n_out),
    ]


def _base(config: TransformerConfig) -> list[TensorMapping]:
    heads = [f"attention/{name}" for name in ("query", "key", "value")]
    return [
        same_layout("model.embeddings.tok_embeddings.weight", "tokens/embedding"),
        *norm_mappings("model.embeddings.norm", "embedding_norm"),
        *norm_mappings(f"{_LAYER}.attn_norm", f"{_LAYERS}/attention_norm"),
        *_fused("attn.Wqkv", heads, "H K"),
        *linear_mappings(f"{_LAYER}.attn.Wo", f"{_LAYERS}/attention/out", "H K", "D"),
        *norm_mappings(f"{_LAYER}.mlp_norm", f"{_LAYERS}/feed_forward_norm"),
        *_fused("mlp.Wi", ["feed_forward/gate", "feed_forward/in"], "F"),
        *linear_mappings(f"{_LAYER}.mlp.Wo", f"{_LAYERS}/feed_forward/out"),
        *norm_mappings("model.final_norm", "stack/final_norm"),
    ]


def _read(hf: Values) -> Values:
    if not states_class(hf, _TASKS.values()):
        require_equal(hf, decoder_bias=True)
    n_layers = read_size(hf, "num_hidden_layers")
    key = "global_attn_every_n_layers"
    every = int(positive_number(key, hf.get(key, 3)))
    types = hf.get("layer_types") or layer_types(n_layers, every, 0)
    local = read_size(hf, "local_attention")
    old = {
        "rope_theta": hf.get("global_rope_theta"),
        "rope_local_base_freq": hf.get("local_rope_theta"),
        "sliding_window": local - local % 2 or local,  # as many on either side
    }
    return (
        read_windows(hf | old, types)
        | read_layer_rope(hf | old, types, 160_000.0, 10_000.0)
        | {
            "activation": lm_word(hf, "hidden_activation", GATED_ACTIVATIONS, "gelu"),
            "transform_activation": lm_word(hf, "classifier_activation", ACTIVATIONS, "gelu"),
            "bias": hf.get("mlp_bias", False),
            "attention_bias": "all" if hf.get("attention_bias") else "none",
            "norm_bias": hf.get("norm_bias", False),
            "norm_eps": hf.get("norm_eps", 1e-5),
            "transform_bias": hf.get("classifier_bias", False),
            "pooling": lm_word(hf, "classifier_pooling", _POOLINGS, "cls"),
            "tie_embeddings": hf.get("tie_word_embeddings", True),
            "max_length": hf.get("max_position_embeddings", 8192),
            "attention_dropout": hf.get("attention_dropout", 0.0),
            "activation_dropout": hf.get("mlp_dropout", 0.0),
            "dropout": hf.get("embedding_dropout", 0.0),
        }
    )


def _write(config: TransformerConfig) -> Values:
    if config.d_model != config.n_heads * config.head_dim or config.n_kv_heads != config.n_heads:
        raise UnsupportedConfig(
            f"model.head_dim={config.head_dim}, model.n_kv_heads={config.n_kv_heads}"
        )
    if config.window % 2 and config.window > 1:
        raise UnsupportedConfig(f"model.window={config.window}")
    rope = write_layer_rope(config)
    return {
        **dict.fromkeys(_SPECIAL_IDS),  # the defaults belong to one particular vocabulary
        "rope_parameters": rope["rope_parameters"],
        "layer_types": config_layer_types(config),
        "local_attention": config.window or 128,
        "hidden_activation": hf_word(config.activation, GATED_ACTIVATIONS, "activation"),
        "classifier_activation": hf_word(
            output_activation(config.transform_activation, config.activation),
            ACTIVATIONS,
            "transform_activation",
        ),
        "mlp_bias": config.bias,
        "attention_bias": "query" in config.attention_biases,
        "norm_bias": config.norm_bias,
        "norm_eps": config.norm_eps,
        "classifier_bias": config.transform_bias,
        "classifier_pooling": hf_word(config.pooling, _POOLINGS, "pooling"),
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_length,
        "attention_dropout": config.attention_dropout,
        "mlp_dropout": config.activation_dropout,
        "embedding_dropout": config.dropout,
    }


_CLASSIFIER = Head(("classifier",), tuple(linear_mappings("classifier", "classifier")))
MODERNBERT = Family(
    model_type="modernbert",
    model="encoder",
    classes={
        frozenset({_TRANSFORM, _MASKED}): "ModernBertForMaskedLM",
        frozenset(): "ModernBertModel",
        **_TASKS,
    },
    prefix="model.",
    base=_base,
    heads={
        _TRANSFORM: Head(
            ("transform", "transform_norm"),
            (
                *linear_mappings("head.dense", "transform"),
                *norm_mappings("head.norm", "transform_norm"),
            ),
        ),
        _MASKED: Head(
            ("logit_bias", "head"),
            (same_layout("decoder.bias", "logit_bias/bias"), output_mapping("decoder.weight")),
        ),
        "classes": replace(_CLASSIFIER, of_tokens=False),
        _TAGS: replace(_CLASSIFIER, of_tokens=True),
        "spans": Head(("span_head",), tuple(linear_mappings("classifier", "span_head"))),
    },
    keys={
        "num_hidden_layers": "n_layers",
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "intermediate_size": "d_ff",
        "vocab_size": "vocab_size",
    },
    fixed={
        "norm": "layernorm",
        "embedding_norm": True,
        "first_norm": False,
        "positions": "rotary",
        "task_transform": True,
    },
    read=_read,
    write=_write,
    output="decoder.weight",
    table="model.embeddings.tok_embeddings.weight",
)
