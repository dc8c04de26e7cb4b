"""BERT (Devlin et al. 2018), RoBERTa (Liu et al. 2019) and ELECTRA (Clark et al. 2020), with heads.

All have the same stack. RoBERTa counts positions from its padding id + 1, has its output layer in
`lm_head`, and pools inside its classifier. ELECTRA's embeddings may have a different width; its
generator has the output layer, its discriminator detects replaced tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from lm.interop.activation_words import ACTIVATIONS
from lm.interop.family import (
    Family,
    Head,
    UnsupportedConfig,
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
from lm.models.transformer_config import TransformerConfig

_LAYERS = "stack/layers"


def _base(name: str) -> list[TensorMapping]:
    embeddings, layer = f"{name}.embeddings", f"{name}.encoder.layer.{{}}"
    return [
        same_layout(f"{embeddings}.word_embeddings.weight", "tokens/embedding"),
        same_layout(f"{embeddings}.position_embeddings.weight", "positions/embedding"),
        same_layout(f"{embeddings}.token_type_embeddings.weight", "types/embedding"),
        *norm_mappings(f"{embeddings}.LayerNorm", "embedding_norm"),
        *linear_mappings(f"{name}.embeddings_project", "embedding_projection"),
        *linear_mappings(f"{layer}.attention.self.query", f"{_LAYERS}/attention/query", "D", "H K"),
        *linear_mappings(f"{layer}.attention.self.key", f"{_LAYERS}/attention/key", "D", "H K"),
        *linear_mappings(f"{layer}.attention.self.value", f"{_LAYERS}/attention/value", "D", "H K"),
        *linear_mappings(f"{layer}.attention.output.dense", f"{_LAYERS}/attention/out", "H K", "D"),
        *norm_mappings(f"{layer}.attention.output.LayerNorm", f"{_LAYERS}/attention_norm"),
        *linear_mappings(f"{layer}.intermediate.dense", f"{_LAYERS}/feed_forward/in"),
        *linear_mappings(f"{layer}.output.dense", f"{_LAYERS}/feed_forward/out"),
        *norm_mappings(f"{layer}.output.LayerNorm", f"{_LAYERS}/feed_forward_norm"),
    ]


KEYS = {
    "num_hidden_layers": "n_layers",
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "intermediate_size": "d_ff",
    "vocab_size": "vocab_size",
    "type_vocab_size": "token_types",
}

_FIXED = {
    "norm": "layernorm",
    "norm_placement": "post",
    "embedding_norm": True,
    "positions": "learned",
}


def _read(hf: Values) -> Values:
    require_equal(
        hf, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False
    )
    return {
        "norm_eps": hf.get("layer_norm_eps", 1e-12),
        "tie_embeddings": hf.get("tie_word_embeddings", True),
        "dropout": hf.get("hidden_dropout_prob", 0.1),
        "attention_dropout": hf.get("attention_probs_dropout_prob", 0.1),
    }


def _write(config: TransformerConfig) -> Values:
    return {
        "layer_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
    }


def _read_bert(hf: Values) -> Values:
    return _read(hf) | {
        "max_length": hf.get("max_position_embeddings", 512),
        "activation": lm_word(hf, "hidden_act", ACTIVATIONS, "gelu"),
    }


def _write_bert(config: TransformerConfig) -> Values:
    return _write(config) | {
        "max_position_embeddings": config.max_length,
        "hidden_act": hf_word(config.activation, ACTIVATIONS, "activation"),
    }


def _read_roberta(hf: Values) -> Values:
    pad = hf.get("pad_token_id", 1)
    if isinstance(pad, bool) or not isinstance(pad, int) or not 0 <= pad < hf["vocab_size"]:
        raise UnsupportedConfig(
            f"config.json: pad_token_id={pad} is not an id of its {hf['vocab_size']} tokens, "
            "and positions count from it"
        )
    offset = 1 + pad
    return _read_bert(hf) | {
        "transform_activation": "gelu_erf",
        "position_offset": offset,
        "max_length": hf["max_position_embeddings"] - offset,
    }


def _write_roberta(config: TransformerConfig) -> Values:
    return _write_bert(config) | {
        "pad_token_id": config.position_offset - 1,
        "max_position_embeddings": config.max_length + config.position_offset,
    }


def _read_electra(hf: Values) -> Values:
    width = read_size(hf, "embedding_size")
    return _read_bert(hf) | {
        "embedding_size": 0 if width == hf["hidden_size"] else width,
        "transform_activation": "gelu_erf",
        "pooler_activation": "gelu_erf",
    }


def _write_electra(config: TransformerConfig) -> Values:
    return _write_bert(config) | {"embedding_size": config.embedding_size or config.d_model}


_LM, _NEXT, _POOLER, _CLASSES, _SPANS = "masked", "next_sentence", "pooler", "classes", "spans"
_REPLACED = "replaced"
# RoBERTa's token classifier and the pooler of its bare model have their own names.
_TAGS, _SUMMARY = "tags", "summary"


def _family(
    name: str,
    title: str,
    read: Callable[[Values], Values],
    write: Callable[[TransformerConfig], Values],
    *,
    masked: str,
    dense: str,
    dense_norm: str,
    pooler: str,
    classifier: str,
    output: str = "",
    classes: Mapping[frozenset[str], str] = MappingProxyType({}),
    heads: Mapping[str, Head] = MappingProxyType({}),
    renamed: Mapping[str, str] = MappingProxyType({}),
) -> Family:
    """Build the family.

    Args:
        name: `model_type`.
        title: prefix of the class names.
        read: fields of TransformerConfig from config.json.
        write: values of config.json from a TransformerConfig.
        masked: tensor prefix of the masked-language-model head; its `decoder.weight` is stored
            if the embeddings are untied.
        dense: tensor prefix of that head's dense layer.
        dense_norm: tensor prefix of that head's norm.
        pooler: tensor prefix of the pooler.
        classifier: tensor prefix of the classifier.
        output: tensor of the output matrix; "": `decoder.weight` of the masked head.
        classes: further classes by heads.
        heads: further heads.
        renamed: patterns of old tensor names, and their replacements.
    """
    copies = {} if output else {f"{masked}.decoder.bias": f"{masked}.bias"}
    output = output or f"{masked}.decoder.weight"
    output_layer = (
        *linear_mappings(dense, "transform"),
        *norm_mappings(dense_norm, "transform_norm"),
        same_layout(f"{masked}.bias", "logit_bias/bias"),
        output_mapping(output),
    )
    return Family(
        model_type=name,
        model="encoder",
        classes={
            frozenset({_LM}): f"{title}ForMaskedLM",
            frozenset({_POOLER, _CLASSES}): f"{title}ForSequenceClassification",
            frozenset({_SPANS}): f"{title}ForQuestionAnswering",
            frozenset(): f"{title}Model",
            **classes,
        },
        prefix=f"{name}.",
        base=lambda _: _base(name),
        heads={
            _LM: Head(("transform", "transform_norm", "logit_bias", "head"), output_layer),
            _POOLER: Head(("pooler",), tuple(linear_mappings(pooler, "pooler"))),
            _CLASSES: Head(("classifier",), tuple(linear_mappings(classifier, "classifier"))),
            _SPANS: Head(("span_head",), tuple(linear_mappings("qa_outputs", "span_head"))),
            **heads,
        },
        keys=KEYS,
        fixed=_FIXED,
        read=read,
        write=write,
        output=output,
        table=f"{name}.embeddings.word_embeddings.weight",
        copies=copies,
        ignored=[rf"{name}\.embeddings\.position_ids"],
        renamed=renamed,
    )


BERT = _family(
    "bert",
    "Bert",
    _read_bert,
    _write_bert,
    masked="cls.predictions",
    dense="cls.predictions.transform.dense",
    dense_norm="cls.predictions.transform.LayerNorm",
    pooler="bert.pooler.dense",
    classifier="classifier",
    classes={
        frozenset({_LM, _POOLER, _NEXT}): "BertForPreTraining",
        frozenset({_POOLER, _NEXT}): "BertForNextSentencePrediction",
        frozenset({_POOLER}): "BertModel",
        frozenset({_CLASSES}): "BertForTokenClassification",
    },
    heads={
        _NEXT: Head(
            ("sentence_head",), tuple(linear_mappings("cls.seq_relationship", "sentence_head"))
        )
    },
    renamed={r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias"},
)

ROBERTA = _family(
    "roberta",
    "Roberta",
    _read_roberta,
    _write_roberta,
    masked="lm_head",
    dense="lm_head.dense",
    dense_norm="lm_head.layer_norm",
    pooler="classifier.dense",
    classifier="classifier.out_proj",
    classes={
        frozenset({_TAGS}): "RobertaForTokenClassification",
        frozenset({_SUMMARY}): "RobertaModel",
    },
    heads={
        _TAGS: Head(("classifier",), tuple(linear_mappings("classifier", "classifier"))),
        _SUMMARY: Head(("pooler",), tuple(linear_mappings("roberta.pooler.dense", "pooler"))),
    },
)

_DISCRIMINATOR = "discriminator_predictions"
ELECTRA = replace(
    _family(
        "electra",
        "Electra",
        _read_electra,
        _write_electra,
        masked="generator_lm_head",
        dense="generator_predictions.dense",
        dense_norm="generator_predictions.LayerNorm",
        pooler="classifier.dense",
        classifier="classifier.out_proj",
        output="generator_lm_head.weight",
        classes={
            frozenset({_REPLACED}): "ElectraForPreTraining",
            frozenset({_TAGS}): "ElectraForTokenClassification",
        },
        heads={
            _REPLACED: Head(
                ("replaced_transform", "replaced_head"),
                (
                    *linear_mappings(f"{_DISCRIMINATOR}.dense", "replaced_transform"),
                    *linear_mappings(f"{_DISCRIMINATOR}.dense_prediction", "replaced_head"),
                ),
            ),
            _TAGS: Head(("classifier",), tuple(linear_mappings("classifier", "classifier"))),
        },
    ),
    left_out=["generator"],
)
