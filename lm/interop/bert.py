"""BERT (Devlin et al. 2018) and RoBERTa (Liu et al. 2019), bare and with heads of their classes.

Both have the same stack. RoBERTa counts positions from after its padding id, keeps its output
layer in `lm_head`, and pools inside its classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from lm.interop.family import Family, Head, Values, choose, require_equal, word_for
from lm.interop.tensor_mapping import TensorMapping, linear, norm, output, same
from lm.models.transformer_config import TransformerConfig

ACTIVATIONS = {
    "gelu": "gelu_erf",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "gelu_pytorch_tanh": "gelu_tanh",
}

_LAYERS = "stack/layers"


def _base(name: str) -> list[TensorMapping]:
    embeddings, layer = f"{name}.embeddings", f"{name}.encoder.layer.{{}}"
    return [
        same(f"{embeddings}.word_embeddings.weight", "tokens/embedding"),
        same(f"{embeddings}.position_embeddings.weight", "positions/embedding"),
        same(f"{embeddings}.token_type_embeddings.weight", "types/embedding"),
        *norm(f"{embeddings}.LayerNorm", "embedding_norm"),
        *linear(f"{layer}.attention.self.query", f"{_LAYERS}/attention/query", "D", "H K"),
        *linear(f"{layer}.attention.self.key", f"{_LAYERS}/attention/key", "D", "H K"),
        *linear(f"{layer}.attention.self.value", f"{_LAYERS}/attention/value", "D", "H K"),
        *linear(f"{layer}.attention.output.dense", f"{_LAYERS}/attention/out", "H K", "D"),
        *norm(f"{layer}.attention.output.LayerNorm", f"{_LAYERS}/attention_norm"),
        *linear(f"{layer}.intermediate.dense", f"{_LAYERS}/feed_forward/in"),
        *linear(f"{layer}.output.dense", f"{_LAYERS}/feed_forward/out"),
        *norm(f"{layer}.output.LayerNorm", f"{_LAYERS}/feed_forward_norm"),
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


def _read(theirs: Values) -> Values:
    require_equal(
        theirs, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False
    )
    return {
        "norm_eps": theirs.get("layer_norm_eps", 1e-12),
        "tie_embeddings": theirs.get("tie_word_embeddings", True),
        "dropout": theirs.get("hidden_dropout_prob", 0.1),
        "attention_dropout": theirs.get("attention_probs_dropout_prob", 0.1),
    }


def _write(config: TransformerConfig) -> Values:
    return {
        "layer_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
    }


def _read_bert(theirs: Values) -> Values:
    return _read(theirs) | {
        "max_length": theirs.get("max_position_embeddings", 512),
        "activation": choose(theirs, "hidden_act", ACTIVATIONS, "gelu"),
    }


def _write_bert(config: TransformerConfig) -> Values:
    return _write(config) | {
        "max_position_embeddings": config.max_length,
        "hidden_act": word_for(config.activation, ACTIVATIONS, "activation"),
    }


def _read_roberta(theirs: Values) -> Values:
    # The output layer's activation is always this one.
    choose(theirs, "hidden_act", {"gelu": "gelu_erf"}, "gelu")
    offset = 1 + theirs.get("pad_token_id", 1)
    return _read(theirs) | {
        "activation": "gelu_erf",
        "position_offset": offset,
        "max_length": theirs.get("max_position_embeddings", 512) - offset,
    }


def _write_roberta(config: TransformerConfig) -> Values:
    return _write(config) | {
        "hidden_act": "gelu",
        "pad_token_id": config.position_offset - 1,
        "max_position_embeddings": config.max_length + config.position_offset,
    }


_LM, _NEXT, _POOLER, _CLASSES, _SPANS = "masked", "next_sentence", "pooler", "classes", "spans"


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
    classes: Mapping[frozenset[str], str] = MappingProxyType({}),
    heads: Mapping[str, Head] = MappingProxyType({}),
    renamed: Mapping[str, str] = MappingProxyType({}),
) -> Family:
    """The arguments from `masked` on are names of theirs: of the layer that predicts masked tokens,
    whose output matrix is there if it is not the table, and of the other heads' layers."""
    output_layer = (
        *linear(dense, "transform"),
        *norm(dense_norm, "transform_norm"),
        same(f"{masked}.bias", "logit_bias/bias"),
        output(f"{masked}.decoder.weight"),
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
            _POOLER: Head(("pooler",), tuple(linear(pooler, "pooler"))),
            _CLASSES: Head(("classifier",), tuple(linear(classifier, "classifier"))),
            _SPANS: Head(("span_head",), tuple(linear("qa_outputs", "span_head"))),
            **heads,
        },
        keys=KEYS,
        fixed=_FIXED,
        read=read,
        write=write,
        output=f"{masked}.decoder.weight",
        table=f"{name}.embeddings.word_embeddings.weight",
        copies={f"{masked}.decoder.bias": f"{masked}.bias"},
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
        frozenset({_POOLER}): "BertModel",
    },
    heads={_NEXT: Head(("sentence_head",), tuple(linear("cls.seq_relationship", "sentence_head")))},
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
)
