"""Classification of the words of a text, such as named-entity recognition.

Devlin et al. 2018, section 5.3: the label of a word is predicted from its first token.

Shape letters: B batch, L length, D model, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import numpy as np
from ml_collections import ConfigDict

from lm.config.registry import listed
from lm.data.batches import Arrays
from lm.data.record_store import Record, RecordStore
from lm.data.special_tokens import SpecialTokens, special_tokens
from lm.data.tokenizer import Template, Tokenizer
from lm.errors import UserError
from lm.objectives.classification import checked_labels, decoder_template
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

OUTSIDE = "O"  # label of words outside all entities


@dataclass(frozen=True)
class TokenClassification(Objective[RecordStore, Record]):
    """Word labels for rows "[CLS] words [SEP]"; with an imported decoder, as in `Classification`.

    Words beyond the end of the row, and words without tokens, are predicted as "O" (or as the first
    label).

    Attributes:
        length: row length L in tokens.
        labels: class names in the order of their scores.
        special: special token ids.
        around: template that replaces [CLS] and [SEP], or None.
    """

    families: ClassVar = ("encoder", "decoder")
    columns: ClassVar = ("words", "tags")
    task: ClassVar = "predict"
    has_perplexity: ClassVar = False

    length: int
    labels: tuple[str, ...]
    special: SpecialTokens
    around: Template | None = None

    def __post_init__(self) -> None:
        if self.length < 3:
            raise UserError(
                f"--config.data.sequence_length={self.length} leaves no room for a word "
                "between [CLS] and [SEP]: use at least 3"
            )

    @classmethod
    def from_config(cls, config: ConfigDict, tokenizer: Tokenizer | None) -> TokenClassification:
        data = config.data
        if not listed(data.labels):
            raise UserError(
                "--config.objective.name=token_classification needs --config.data.labels"
            )
        around, labels = decoder_template(config, tokenizer), checked_labels(config)
        return cls(data.sequence_length, labels, special_tokens(tokenizer), around)

    @property
    def shapes(self) -> Shapes:
        row = (self.length,)
        names = ("inputs", "segment_ids", "targets")
        return {**dict.fromkeys(names, (row, "int32")), "weights": (row, "float32")}

    @property
    def n_extra_ids(self) -> int:  # type: ignore[override]
        return self.special.n_extra_ids(*self._ids.before, *self._ids.after, 0)

    @property
    def _ids(self) -> Template:
        return self.around or Template((self.special.cls,), (self.special.sep,))

    def examples(self, store: RecordStore, training: bool) -> RecordStore:
        """Return the store itself: each record is an example."""
        self.require_columns(store)
        return store

    def features(self, example: Record, rng: np.random.Generator) -> Arrays:
        """Return inputs, segment_ids (1; padding 0), targets and weights [L].

        The weight is 1 at the first token of a word, whose target is the word's label.
        """
        features = {name: np.zeros(*shape) for name, shape in self.shapes.items()}
        before, after = self._ids.before, self._ids.after
        tokens = example.tokens["words"][: self.length - len(before) - len(after)]
        end = len(before) + len(tokens) + len(after)
        features["inputs"][:end] = [*before, *tokens, *after]
        features["segment_ids"][:end] = 1
        tags = example.raw["tags"].split(" ")
        for column, word in self._first_tokens(example):
            features["targets"][column] = self.labels.index(tags[word])
            features["weights"][column] = 1
        return features

    def _first_tokens(self, record: Record) -> Iterator[tuple[int, int]]:
        """Yield (column of the first token, word index) for each word in the row."""
        assert record.starts is not None
        words, firsts = np.unique(record.starts, return_index=True)
        for word, first in zip(words.tolist(), firsts.tolist(), strict=True):
            column = len(self._ids.before) + first
            if column < self.length - len(self._ids.after):
                yield column, word

    def loss(self, model: BoundModel, batch: Batch) -> LossSums:
        """Return the cross-entropy and accuracy of labels at first tokens."""
        loss_BL, _, correct_BL = cross_entropy(self._scores(model, batch), batch["targets"])
        weights_BL = batch["weights"]
        metrics = {"accuracy": (correct_BL * weights_BL).sum()}
        return LossSums((loss_BL * weights_BL).sum(), weights_BL.sum(), metrics)

    def _scores(self, model: BoundModel, batch: Batch) -> jax.Array:
        x_BLD = model.hidden(batch["inputs"], None, batch["segment_ids"])
        return model.classify(x_BLD)

    def predict(self, model: BoundModel, batch: Batch) -> jax.Array:
        """Return the predicted class of each token, int [B, L]."""
        return self._scores(model, batch).argmax(-1)

    # --- task

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("seqeval",)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.labels

    def answers(self, stores: Sequence[RecordStore], outputs: np.ndarray) -> list[Answer]:
        """Return the predicted labels of each record's words, separated by spaces."""
        records = (record for store in stores for record in store)
        return [self._labels(*pair) for pair in zip(records, outputs, strict=True)]

    def _labels(self, record: Record, classes_L: np.ndarray) -> str:
        outside = OUTSIDE if OUTSIDE in self.labels else self.labels[0]
        labels = [outside] * len(record.raw["tags"].split(" "))
        for column, word in self._first_tokens(record):
            labels[word] = self.labels[classes_L[column]]
        return " ".join(labels)

    def reference(self, record: Record) -> Reference:
        return record.raw["tags"]
