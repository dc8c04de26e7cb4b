"""Objectives by name."""

from __future__ import annotations

from collections.abc import Callable

from ml_collections import ConfigDict

from lm.data.tokenizers.tokenizer import Tokenizer
from lm.objectives.causal import Causal
from lm.objectives.classification import Classification
from lm.objectives.masked import Masked
from lm.objectives.objective import Objective
from lm.objectives.prefix import Prefix
from lm.objectives.seq2seq import Seq2Seq
from lm.objectives.skip_gram import SkipGram
from lm.objectives.span_corruption import SpanCorruption
from lm.objectives.span_qa import SpanQa
from lm.objectives.special_tokens import special_tokens

# Those that learn from the records of a task; the others read documents.
OF_RECORDS = ("seq2seq", "classification", "span_qa")


def _causal(config: ConfigDict, tokenizer: Tokenizer | None) -> Objective:
    d, o = config.data, config.objective
    return Causal(
        d.sequence_length,
        d.stride,
        d.isolate_documents,
        config.model.carry,
        o.label_smoothing,
        o.z_loss,
    )


def _prefix(config: ConfigDict, tokenizer: Tokenizer | None) -> Objective:
    d, o = config.data, config.objective
    return Prefix(d.sequence_length, d.stride, d.isolate_documents, o.label_smoothing, o.z_loss)


def _masked(config: ConfigDict, tokenizer: Tokenizer | None) -> Objective:
    d, o = config.data, config.objective
    return Masked(
        tokenizer,
        d.sequence_length,
        d.stride,
        d.isolate_documents,
        o.mask_rate,
        o.whole_word,
        o.next_sentence,
        o.label_smoothing,
        o.z_loss,
    )


def _span_corruption(config: ConfigDict, tokenizer: Tokenizer | None) -> Objective:
    d, o = config.data, config.objective
    return SpanCorruption(
        tokenizer,
        d.sequence_length,
        d.stride,
        o.noise_density,
        o.mean_span,
        o.label_smoothing,
        o.z_loss,
    )


def _seq2seq(config: ConfigDict, tokenizer: Tokenizer | None) -> Objective:
    d, o = config.data, config.objective
    return Seq2Seq(
        d.sequence_length,
        d.target_length,
        special_tokens(tokenizer),
        d.pack,
        o.label_smoothing,
        o.z_loss,
        config.seed,
    )


def _classification(config: ConfigDict, tokenizer: Tokenizer | None) -> Objective:
    d = config.data
    return Classification(d.sequence_length, label_names(d.labels), special_tokens(tokenizer))


def _span_qa(config: ConfigDict, tokenizer: Tokenizer | None) -> Objective:
    d = config.data
    return SpanQa(d.sequence_length, d.doc_stride, special_tokens(tokenizer))


def _skip_gram(config: ConfigDict, tokenizer: Tokenizer | None) -> Objective:
    d, o = config.data, config.objective
    return SkipGram(tokenizer, d.sequence_length, d.stride, o.window, o.negatives, o.subsample)


OBJECTIVES: dict[str, Callable[[ConfigDict, Tokenizer | None], Objective]] = {
    "causal": _causal,
    "prefix": _prefix,
    "masked": _masked,
    "span_corruption": _span_corruption,
    "seq2seq": _seq2seq,
    "classification": _classification,
    "span_qa": _span_qa,
    "skip_gram": _skip_gram,
}


def make_objective(config: ConfigDict, tokenizer: Tokenizer | None = None) -> Objective:
    """The objective that `config.objective.name` names.

    Its loss and shapes need no tokenizer; its features do, for the ids of special tokens.
    """
    return OBJECTIVES[config.objective.name](config, tokenizer)


def label_names(text: str) -> tuple[str, ...]:
    """The classes that `config.data.labels` lists."""
    return tuple(name.strip() for name in text.split(",") if name.strip())
