"""Classification of a text or text pair; regression if there are no classes.

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

from lm.config.registry import listed
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
    """

    families: ClassVar = ("decoder", "encoder", "encoder_decoder", "lstm")
    columns: ClassVar = ("text", "label")
    task: ClassVar = "predict"
    has_perplexity: ClassVar = False

    length: int
    labels: tuple[str, ...]
    special: SpecialTokens
    around: Template | None = None

    def __post_init__(self) -> None:
        if self.length < 5:
            raise UserError(
                f"--config.data.sequence_length={self.length} leaves no room for two texts between "
                "[CLS] and [SEP]: use at least 5"
            )

    @classmethod
    def from_config(cls, config: ConfigDict, tokenizer: Tokenizer | None) -> Classification:
        around, labels = decoder_template(config, tokenizer), checked_labels(config)
        return cls(config.data.sequence_length, labels, special_tokens(tokenizer), around)

    @property
    def shapes(self) -> Shapes:
        names = ("inputs", "segment_ids", "token_types")
        return {
            **dict.fromkeys(names, ((self.length,), "int32")),
            "label": ((), "int32" if self.labels else "float32"),
            "weights": ((), "float32"),
        }

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
        features["label"][...] = self.labels.index(label) if self.labels else float(label)
        features["weights"][...] = 1
        return features

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
        """Return the cross-entropy and accuracy of the class, or the squared error."""
        scores_BC = self.predict(model, batch)
        label_B, weights_B = batch["label"], batch["weights"]
        if self.labels:
            loss_B, _, correct_B = cross_entropy(scores_BC, label_B)
            metrics = {"accuracy": (correct_B * weights_B).sum()}
        else:
            loss_B = jnp.square(scores_BC[:, 0] - label_B)
            metrics = {}
        return LossSums((loss_B * weights_B).sum(), weights_B.sum(), metrics)

    def predict(self, model: BoundModel, batch: Batch) -> jax.Array:
        """Return float32 class scores [B, C], or the regression output [B, 1]."""
        segments_BL = batch["segment_ids"]
        x_BLD = model.hidden(batch["inputs"], None, segments_BL, batch["token_types"])
        return model.classify(model.pooled(x_BLD, segments_BL))

    # --- task

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("accuracy",) if self.labels else ("pearson", "spearman")

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.labels

    def answers(self, stores: Sequence[RecordStore], outputs: np.ndarray) -> list[Answer]:
        """Return the best class name, or the number, for each record."""
        if self.labels:
            return [self.labels[i] for i in outputs.argmax(-1)]
        return [float(score) for score in outputs[:, 0]]

    def reference(self, record: Record) -> Reference:
        label = record.raw["label"]
        return label if self.labels else float(label)


def decoder_template(config: ConfigDict, tokenizer: Tokenizer | None) -> Template | None:
    """Return the ids around a text for a decoder imported with its tokenizer; else None."""
    is_decoder = config.model.family == "decoder"
    if tokenizer is None or not tokenizer.states_template or not is_decoder:
        return None
    return tokenizer.template


def checked_labels(config: ConfigDict) -> tuple[str, ...]:
    """Return the class names; UserError if they do not match the model outputs."""
    labels = tuple(listed(config.data.labels))
    if problem := _label_problem(labels, config.model.n_classes):
        raise UserError(f"--config.data.labels={config.data.labels}: {problem}")
    return labels


def _label_problem(labels: tuple[str, ...], n_classes: int) -> str:
    """Return why these labels do not fit `n_classes` outputs, or ""."""
    repeated = [label for label in dict.fromkeys(labels) if labels.count(label) > 1]
    if repeated:
        return f"{repeated[0]!r} occurs {labels.count(repeated[0])} times; name each class once"
    if len(labels) == 1:
        return "a single class leaves nothing to learn; name all classes, or none for a number"
    if labels and 0 < n_classes < len(labels):
        return f"{len(labels)} classes for --config.model.n_classes={n_classes} outputs"
    if not labels and n_classes > 1:
        return (
            f"name the classes of --config.model.n_classes={n_classes}: without, it is regression"
        )
    return ""
