"""Classification of a text or of a pair of texts; without classes, regression of a number.

Shape letters: B batch, L length, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.data.records.record_store import Record, RecordStore
from lm.errors import UserError
from lm.kernels.cross_entropy import cross_entropy
from lm.objectives.columns import require_columns
from lm.objectives.objective import Batch, LossSums
from lm.objectives.special_tokens import SpecialTokens


@dataclass(frozen=True)
class Classification:
    """[cls] text [sep], or [cls] text [sep] text2 [sep] (Devlin 2018, §4.1).

    `labels` are the classes' names; without any, the label is a number and the loss its squared
    error. A pair that is too long loses tokens at the end of its longer text.
    """

    length: int
    labels: tuple[str, ...]
    special: SpecialTokens

    def __post_init__(self) -> None:
        if self.length < 5:
            raise UserError(
                f"--config.data.sequence_length={self.length} leaves no room for two texts between "
                "[cls] and [sep]: use at least 5"
            )

    @property
    def shapes(self) -> Mapping[str, tuple[tuple[int, ...], str]]:
        rows = dict.fromkeys(("tokens", "segment_ids", "types"), ((self.length,), "int32"))
        return {
            **rows,
            "label": ((), "int32" if self.labels else "float32"),
            "weight": ((), "float32"),
        }

    @property
    def n_extra_ids(self) -> int:
        return self.special.n_extra_ids(self.special.cls, self.special.sep)

    def examples(self, store: RecordStore, training: bool) -> RecordStore:
        require_columns(store, "text", "label")
        return store

    def features(self, example: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Tokens [L], segments (1; padding 0), types (0 and 1), the label, and a weight of 1."""
        tokens, types = self.tokens(example)
        row = {name: np.zeros(*shape) for name, shape in self.shapes.items()}
        row["tokens"][: len(tokens)] = tokens
        row["segment_ids"][: len(tokens)] = 1
        row["types"][: len(tokens)] = types
        label = example.raw["label"]
        row["label"][...] = self.labels.index(label) if self.labels else float(label)
        row["weight"][...] = 1
        return row

    def tokens(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and types of a record, no longer than `length`."""
        cls, sep = self.special.cls, self.special.sep
        first = record.tokens["text"]
        if "text2" in record.tokens:
            second, room = record.tokens["text2"], self.length - 3
            # What is left when the longer one has lost token after token, of equals the second.
            limits = max(room - len(second), (room + 1) // 2), max(room - len(first), room // 2)
            texts = [first[: limits[0]], second[: limits[1]]]
        else:
            texts = [first[: self.length - 2]]
        parts = [np.append(text, sep) for text in texts]
        parts[0] = np.append(cls, parts[0])
        types = [np.full(len(part), i) for i, part in enumerate(parts)]
        return np.concatenate(parts), np.concatenate(types)

    def loss(self, model: Any, batch: Batch) -> LossSums:
        """Nats of the right class and accuracy, or squared error."""
        scores_BC = self.predict(model, batch)
        label_B, weight_B = batch["label"], batch["weight"]
        if self.labels:
            loss_B, _, right_B = cross_entropy(scores_BC, label_B)
            metrics = {"accuracy": (right_B * weight_B).sum()}
        else:
            loss_B = jnp.square(scores_BC[:, 0] - label_B)
            metrics = {}
        return LossSums((loss_B * weight_B).sum(), weight_B.sum(), metrics)

    def predict(self, model: Any, batch: Batch) -> jax.Array:
        """Scores of the classes, or the number in a single column, [B, C] float32."""
        segments_BL = batch["segment_ids"]
        x_BLD = model.hidden(batch["tokens"], None, segments_BL, batch["types"])
        return model.classify(model.pooled(x_BLD, segments_BL))
