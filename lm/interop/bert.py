"""BERT (Devlin et al. 2018) and RoBERTa (Liu et al. 2019), bare and with heads of their classes.

Both have the same stack. RoBERTa counts positions from after its padding id, keeps its output
layer in `lm_head`, and pools inside its classifier.
"""

from __future__ import annotations

from lm.interop.family import Family, Head, Values, choose, demand, word_for
from lm.interop.mapping import Row, linear, norm, output, same
from lm.models.config import TransformerConfig

ACTIVATIONS = {
    "gelu": "gelu_erf",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "gelu_pytorch_tanh": "gelu_tanh",
}

_LAYERS = "stack/layers"


def _base(name: str) -> list[Row]:
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
    demand(theirs, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
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


def _masked(dense: str, norm_name: str, bias: str, decoder: str) -> tuple[Row, ...]:
    """The head that predicts masked tokens; its output matrix is there if it is not the table."""
    return (
        *linear(dense, "transform"),
        *norm(norm_name, "transform_norm"),
        same(bias, "logit_bias/bias"),
        output(decoder),
    )


_LM, _NEXT, _POOLER, _CLASSES, _SPANS = "masked", "next_sentence", "pooler", "classes", "spans"

BERT = Family(
    model_type="bert",
    model="encoder",
    classes={
        frozenset({_LM}): "BertForMaskedLM",
        frozenset({_LM, _POOLER, _NEXT}): "BertForPreTraining",
        frozenset({_POOLER, _CLASSES}): "BertForSequenceClassification",
        frozenset({_SPANS}): "BertForQuestionAnswering",
        frozenset({_POOLER}): "BertModel",
        frozenset(): "BertModel",
    },
    prefix="bert.",
    base=lambda _: _base("bert"),
    heads={
        _LM: Head(
            ("transform", "transform_norm", "logit_bias", "head"),
            _masked(
                "cls.predictions.transform.dense",
                "cls.predictions.transform.LayerNorm",
                "cls.predictions.bias",
                "cls.predictions.decoder.weight",
            ),
        ),
        _NEXT: Head(("sentence_head",), tuple(linear("cls.seq_relationship", "sentence_head"))),
        _POOLER: Head(("pooler",), tuple(linear("bert.pooler.dense", "pooler"))),
        _CLASSES: Head(("classifier",), tuple(linear("classifier", "classifier"))),
        _SPANS: Head(("span_head",), tuple(linear("qa_outputs", "span_head"))),
    },
    keys=KEYS,
    fixed=_FIXED,
    read=_read_bert,
    write=_write_bert,
    output="cls.predictions.decoder.weight",
    table="bert.embeddings.word_embeddings.weight",
    copies={"cls.predictions.decoder.bias": "cls.predictions.bias"},
    ignored=[r"bert\.embeddings\.position_ids"],
    renamed={r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias"},
)

ROBERTA = Family(
    model_type="roberta",
    model="encoder",
    classes={
        frozenset({_LM}): "RobertaForMaskedLM",
        frozenset({_POOLER, _CLASSES}): "RobertaForSequenceClassification",
        frozenset({_SPANS}): "RobertaForQuestionAnswering",
        frozenset(): "RobertaModel",
    },
    prefix="roberta.",
    base=lambda _: _base("roberta"),
    heads={
        _LM: Head(
            ("transform", "transform_norm", "logit_bias", "head"),
            _masked(
                "lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "lm_head.decoder.weight"
            ),
        ),
        _POOLER: Head(("pooler",), tuple(linear("classifier.dense", "pooler"))),
        _CLASSES: Head(("classifier",), tuple(linear("classifier.out_proj", "classifier"))),
        _SPANS: Head(("span_head",), tuple(linear("qa_outputs", "span_head"))),
    },
    keys=KEYS,
    fixed=_FIXED,
    read=_read_roberta,
    write=_write_roberta,
    output="lm_head.decoder.weight",
    table="roberta.embeddings.word_embeddings.weight",
    copies={"lm_head.decoder.bias": "lm_head.bias"},
    ignored=[r"roberta\.embeddings\.position_ids"],
)
