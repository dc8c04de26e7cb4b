"""DeBERTa 2 and 3 (He et al. 2021, 2023), bare or with the heads of its classes.

Only attention has positions, and the layers' own projections are also applied to the position
table, as in the releases of version 3.
"""

from __future__ import annotations

from lm.interop.activation_words import ACTIVATIONS
from lm.interop.bert import KEYS
from lm.interop.family import (
    Family,
    Head,
    UnsupportedConfig,
    Values,
    hf_word,
    lm_word,
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
from lm.models.transformer_config import TransformerConfig

_LAYERS, _LAYER = "stack/layers", "deberta.encoder.layer.{}"
_PAIR = frozenset(("c2p", "p2c"))
_HEAD = "cls.predictions"
_ALWAYS = {
    "relative_attention": True,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
}


def _base(config: TransformerConfig) -> list[TensorMapping]:
    embeddings, of_self = "deberta.embeddings", f"{_LAYER}.attention.self"
    attention = f"{_LAYERS}/attention"
    return [
        same_layout(f"{embeddings}.word_embeddings.weight", "tokens/embedding"),
        same_layout(f"{embeddings}.token_type_embeddings.weight", "types/embedding"),
        *norm_mappings(f"{embeddings}.LayerNorm", "embedding_norm"),
        same_layout("deberta.encoder.rel_embeddings.weight", "stack/relative_table/embedding"),
        *norm_mappings("deberta.encoder.LayerNorm", "stack/relative_table/norm"),
        *linear_mappings(f"{of_self}.query_proj", f"{attention}/query", "D", "H K"),
        *linear_mappings(f"{of_self}.key_proj", f"{attention}/key", "D", "H K"),
        *linear_mappings(f"{of_self}.value_proj", f"{attention}/value", "D", "H K"),
        *linear_mappings(f"{_LAYER}.attention.output.dense", f"{attention}/out", "H K", "D"),
        *norm_mappings(f"{_LAYER}.attention.output.LayerNorm", f"{_LAYERS}/attention_norm"),
        *linear_mappings(f"{_LAYER}.intermediate.dense", f"{_LAYERS}/feed_forward/in"),
        *linear_mappings(f"{_LAYER}.output.dense", f"{_LAYERS}/feed_forward/out"),
        *norm_mappings(f"{_LAYER}.output.LayerNorm", f"{_LAYERS}/feed_forward_norm"),
    ]


def _read(hf: Values) -> Values:
    for name, value in _ALWAYS.items():
        require(hf, name)
        require_equal(hf, **{name: value})
    width = hf.get("embedding_size") or hf["hidden_size"]
    require_equal({"width": width, **hf}, width=hf["hidden_size"], conv_kernel_size=0, legacy=True)
    kinds = hf.get("pos_att_type") or ""
    kinds = kinds.split("|") if isinstance(kinds, str) else kinds
    if not isinstance(kinds, list) or {str(kind).strip() for kind in kinds} != _PAIR:
        raise UnsupportedConfig(f"config.json: pos_att_type={kinds} is not supported, only c2p|p2c")
    buckets, longest = read_size(hf, "position_buckets"), hf.get("max_relative_positions", -1)
    length = hf.get("max_position_embeddings", 512)
    if buckets % 2:
        raise UnsupportedConfig(f"config.json: position_buckets={buckets} is odd")
    return {
        "relative_buckets": 2 * buckets,
        "relative_max_distance": longest if longest > 0 else length,
        "max_length": length,
        "activation": lm_word(hf, "hidden_act", ACTIVATIONS, "gelu"),
        "pooler_activation": lm_word(
            hf, "pooler_hidden_act", {"gelu": "gelu_erf", "tanh": "tanh"}, "gelu"
        ),
        "norm_eps": hf.get("layer_norm_eps", 1e-7),
        "tie_embeddings": hf.get("tie_word_embeddings", True),
        "dropout": hf.get("hidden_dropout_prob", 0.1),
        "attention_dropout": hf.get("attention_probs_dropout_prob", 0.1),
    }


def _write(config: TransformerConfig) -> Values:
    c = config
    return _ALWAYS | {
        "pos_att_type": sorted(_PAIR),
        "position_buckets": c.relative_buckets // 2,
        "max_relative_positions": c.relative_max_distance,
        "max_position_embeddings": c.max_length,
        "hidden_act": hf_word(c.activation, ACTIVATIONS, "activation"),
        "pooler_hidden_act": "gelu" if c.pooler_activation == "gelu_erf" else "tanh",
        "pooler_hidden_size": c.d_model,
        "layer_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "hidden_dropout_prob": c.dropout,
        "attention_probs_dropout_prob": c.attention_dropout,
    }


DEBERTA = Family(
    model_type="deberta-v2",
    model="encoder",
    classes={
        frozenset({"masked"}): "DebertaV2ForMaskedLM",
        frozenset({"pooler", "classes"}): "DebertaV2ForSequenceClassification",
        frozenset({"classes"}): "DebertaV2ForTokenClassification",
        frozenset({"spans"}): "DebertaV2ForQuestionAnswering",
        frozenset(): "DebertaV2Model",
    },
    prefix="deberta.",
    base=_base,
    heads={
        "masked": Head(
            ("transform", "transform_norm", "logit_bias", "head"),
            (
                *linear_mappings(f"{_HEAD}.transform.dense", "transform"),
                *norm_mappings(f"{_HEAD}.transform.LayerNorm", "transform_norm"),
                same_layout(f"{_HEAD}.bias", "logit_bias/bias"),
                output_mapping(f"{_HEAD}.decoder.weight"),
            ),
        ),
        "pooler": Head(("pooler",), tuple(linear_mappings("pooler.dense", "pooler"))),
        "classes": Head(("classifier",), tuple(linear_mappings("classifier", "classifier"))),
        "spans": Head(("span_head",), tuple(linear_mappings("qa_outputs", "span_head"))),
    },
    keys=KEYS,
    fixed={
        "norm": "layernorm",
        "norm_placement": "post",
        "embedding_norm": True,
        "mixer": "disentangled",
        "positions": "disentangled",
    },
    read=_read,
    write=_write,
    output=f"{_HEAD}.decoder.weight",
    table="deberta.embeddings.word_embeddings.weight",
    copies={f"{_HEAD}.decoder.bias": f"{_HEAD}.bias"},
    left_out=["generator", "replaced_transform", "replaced_head"],
)
