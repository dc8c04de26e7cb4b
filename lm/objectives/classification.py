"""Classification of a text or text pair, by one label or several; regression without classes.

Shape letters: B batch, L length, D model, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lm.config.registry import listed, listing
from lm.data.batches import Arrays
from lm.data.record_store import Record, RecordStore
from lm.data.special_tokens import SpecialTokens, special_tokens
from lm.data.tokenizer import Template, Tokenizer
from lm.errors import UserError
from lm.objectives.losses import cross_entropy
from lm.objectives.objective import (
    Answer,
    Batch,
    BoundModel,
    LossSums,
    Objective,
    Reference,
    Shapes,
)


@dataclass(frozen=True)
class Classification(Objective[RecordStore, Record]):
    """Class of "[CLS] text [SEP]" or "[CLS] text [SEP] text2 [SEP]" (Devlin et al. 2018, §4.1).

    A pair that is too long loses tokens at the end of its longer text. A decoder imported from
    Hugging Face uses its tokenizer's template, so that its scores match transformers.

    Attributes:
        length: row length L in tokens.
        labels: class names in the order of their scores; () for regression with squared error.
        special: special token ids.
        around: template that replaces [CLS] and [SEP], or None.
        multi_label: whether a text has any number of labels, each with a probability of its own;
            without names of labels, `n_outputs` numbers.
        n_outputs: number of scores, if there are several.
    """

    families: ClassVar = ("decoder", "encoder", "encoder_decoder", "lstm")
    columns: ClassVar = ("text", "label")
    task: ClassVar = "predict"
    has_perplexity: ClassVar = False

    length: int
    labels: tuple[str, ...]
    special: SpecialTokens
    around: Template | None = None
    multi_label: bool = False
    n_outputs: int = 1

    def __post_init__(self) -> None:
        if self.length < 5:
            raise UserError(
                f"--config.data.sequence_length={self.length} leaves no room for two texts between "
                "[CLS] and [SEP]: use at least 5"
            )

    @classmethod
    def from_config(cls, config: ConfigDict, tokenizer: Tokenizer | None) -> Classification:
        around, labels = decoder_template(config, tokenizer), checked_labels(config)
        several = config.data.multi_label, len(labels) or config.model.n_classes
        length, special = config.data.sequence_length, special_tokens(tokenizer)
        return cls(length, labels, special, around, *several)

    @property
    def shapes(self) -> Shapes:
        names = ("inputs", "segment_ids", "token_types")
        return {
            **dict.fromkeys(names, ((self.length,), "int32")),
            "label": self._label_shape,
            "weights": ((), "float32"),
        }

    @property
    def _label_shape(self) -> tuple[tuple[int, ...], str]:
        if self.multi_label:
            return (self.n_outputs,), "float32"
        return (), "int32" if self.labels else "float32"

    @property
    def n_extra_ids(self) -> int:  # type: ignore[override]
        return self.special.n_extra_ids(*self._ids.before, *self._ids.after, 0)

    @property
    def _ids(self) -> Template:
        special = self.special
        return self.around or Template((special.cls,), (special.sep,), special.between)

    def examples(self, store: RecordStore, training: bool) -> RecordStore:
        """Return the store itself: each record is an example."""
        self.require_columns(store)
        return store

    def features(self, example: Record, rng: np.random.Generator) -> Arrays:
        """Return inputs, segment_ids (1; padding 0) and token_types (0, 1) [L]; label; weight 1."""
        tokens, types = self.row(example)
        features = {name: np.zeros(*shape) for name, shape in self.shapes.items()}
        features["inputs"][: len(tokens)] = tokens
        features["segment_ids"][: len(tokens)] = 1
        features["token_types"][: len(tokens)] = types
        label = example.raw["label"]
        if self.multi_label:
            features["label"][:] = self._label_vector(example)
        else:
            features["label"][...] = self.labels.index(label) if self.labels else float(label)
        features["weights"][...] = 1
        return features

    def _label_vector(self, record: Record) -> list[float]:
        """Return which labels a record has, as 0 and 1, or its numbers."""
        label = listed(record.raw["label"])
        if self.labels:
            return [float(name in label) for name in self.labels]
        if len(label) != self.n_outputs:
            raise UserError(f"a label has {len(label)} numbers instead of {self.n_outputs}")
        return [float(number) for number in label]

    def row(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        """Return the token ids and token types of a record, at most `length` of each."""
        before, after, between = self._ids.before, self._ids.after, self._ids.between
        first = record.tokens["text"]
        if "text2" in record.tokens:
            second = record.tokens["text2"]
            room = self.length - len(before) - len(between) - len(after)
            # Lengths after truncating the longer text token by token; ties truncate the second.
            limits = max(room - len(second), (room + 1) // 2), max(room - len(first), room // 2)
            texts = [(first[: limits[0]], between), (second[: limits[1]], after)]
        else:
            texts = [(first[: self.length - len(before) - len(after)], after)]
        parts = [np.concatenate(text).astype(np.int32) for text in texts]
        parts[0] = np.concatenate([before, parts[0]]).astype(np.int32)
        types = [np.full(len(part), i) for i, part in enumerate(parts)]
        return np.concatenate(parts), np.concatenate(types)

    def loss(self, model: BoundModel, batch: Batch) -> LossSums:
        """Return the cross-entropy and accuracy of the class, or the squared error.

        With several labels the cross-entropy is their mean, and a text counts as right if all are.
        """
        scores_BC, weights_B = self.predict(model, batch), batch["weights"]
        if self.labels and not self.multi_label:
            loss_B, _, correct_B = cross_entropy(scores_BC, batch["label"])
        else:
            label_BC = batch["label"].reshape(len(scores_BC), -1)
            scores_BC = scores_BC[:, : label_BC.shape[1]]
            cross_entropy_BC = jax.nn.softplus(scores_BC) - label_BC * scores_BC
            loss_BC = cross_entropy_BC if self.labels else jnp.square(scores_BC - label_BC)
            loss_B, correct_B = loss_BC.mean(-1), ((scores_BC > 0) == (label_BC > 0)).all(-1)
        metrics = {"accuracy": (correct_B * weights_B).sum()} if self.labels else {}
        return LossSums((loss_B * weights_B).sum(), weights_B.sum(), metrics)

    def predict(self, model: BoundModel, batch: Batch) -> jax.Array:
        """Return float32 class scores [B, C], or the regression output [B, 1]."""
        segments_BL = batch["segment_ids"]
        x_BLD = model.hidden(batch["inputs"], None, segments_BL, batch["token_types"])
        return model.classify(model.pooled(x_BLD, segments_BL))

    # --- task

    @property
    def metrics(self) -> tuple[str, ...]:
        if self.labels:
            return ("accuracy",)
        return () if self.multi_label else ("pearson", "spearman")

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.labels

    def answers(self, stores: Sequence[RecordStore], outputs: np.ndarray) -> list[Answer]:
        """Return the best class, the number, or a list of labels or numbers, for each record."""
        if self.multi_label:
            return [self._text(row[: self.n_outputs]) for row in outputs]
        if self.labels:
            return [self.labels[i] for i in outputs.argmax(-1)]
        return [float(score) for score in outputs[:, 0]]

    def reference(self, record: Record) -> Reference:
        if self.multi_label:
            return self._text(self._label_vector(record))
        label = record.raw["label"]
        return label if self.labels else float(label)

    def _text(self, scores: Sequence[float]) -> str:
        """Return the labels with positive scores, or the numbers, as a list."""
        if not self.labels:
            return listing(f"{score:g}" for score in scores)
        pairs = zip(self.labels, scores, strict=True)
        return listing(label for label, score in pairs if score > 0)


def decoder_template(config: ConfigDict, tokenizer: Tokenizer | None) -> Template | None:
    """Return the ids around a text for a decoder imported with its tokenizer; else None."""
    is_decoder = config.model.family == "decoder"
    if tokenizer is None or not tokenizer.states_template or not is_decoder:
        return None
    return tokenizer.template


def checked_labels(config: ConfigDict) -> tuple[str, ...]:
    """Return the class names; UserError if they do not match the model outputs."""
    labels = tuple(listed(config.data.labels))
    if problem := _label_problem(labels, config.model.n_classes, config.data.multi_label):
        raise UserError(f"--config.data.labels={config.data.labels}: {problem}")
    return labels


def _label_problem(labels: tuple[str, ...], n_classes: int, multi_label: bool) -> str:
    """Return why these labels do not fit `n_classes` outputs, or ""."""
    repeated = [label for label in dict.fromkeys(labels) if labels.count(label) > 1]
    if repeated:
        return f"{repeated[0]!r} occurs {labels.count(repeated[0])} times; name each class once"
    if labels and 0 < n_classes < len(labels):
        return f"{len(labels)} classes for --config.model.n_classes={n_classes} outputs"
    if not labels and n_classes > 1 and not multi_label:
        return (
            f"name the classes of --config.model.n_classes={n_classes}: without names it "
            "would be regression"
        )
    return ""
