"""Extractive question answering: where in a context the answer to a question starts and ends.

Devlin 2018, sections 4.2 and 4.3; a context too long for a row is read in overlapping windows.

Shape letters: B batch, L length, D model.
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
from lm.objectives.objective import Batch, Example, LossSums
from lm.objectives.special_tokens import SpecialTokens

MAX_QUESTION = 64  # tokens, as in BERT


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows on the contexts of a store's records, in order.

    Those of record i are numbers offsets[i] … offsets[i + 1] - 1, and steps[i] tokens lie between
    the starts of two of them.
    """

    store: RecordStore
    offsets: np.ndarray
    steps: np.ndarray

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def __getitem__(self, index: int) -> Example:
        """A record, and the number of the context's token with which the window starts."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        record = int(np.searchsorted(self.offsets, index, side="right")) - 1
        start = (index - self.offsets[record]) * self.steps[record]
        return {"record": self.store[record], "start": int(start)}


@dataclass(frozen=True)
class SpanQa:
    """[cls] question [sep] window of the context [sep].

    A window starts every `doc_stride` tokens until one reaches the end of the context. Where it
    does not hold the whole answer, or there is none, the answer starts and ends at [cls].
    Questions end after 64 tokens, or where they would fill half of a row.
    """

    length: int
    doc_stride: int
    special: SpecialTokens

    def __post_init__(self) -> None:
        if self.length < 5:
            raise UserError(
                f"--config.data.sequence_length={self.length} leaves no room for question and "
                "context: use at least 5"
            )

    @property
    def shapes(self) -> Mapping[str, tuple[tuple[int, ...], str]]:
        return {
            **dict.fromkeys(("tokens", "segment_ids", "types"), ((self.length,), "int32")),
            **dict.fromkeys(("start", "end"), ((), "int32")),
            "weight": ((), "float32"),
        }

    @property
    def n_extra_ids(self) -> int:
        return self.special.n_extra_ids(self.special.cls, self.special.sep)

    def examples(self, store: RecordStore, training: bool) -> Windows:
        """Every window of every record."""
        if "answers" not in store[0].raw:
            raise UserError(f"{store.manifest.source} has no answers: span_qa reads squad:FILE")
        questions = np.minimum(store.lengths("question"), self._longest_question)
        room = self.length - 3 - questions
        steps = np.minimum(self.doc_stride, room)
        beyond = np.maximum(store.lengths("context") - room, 0)
        return Windows(store, np.cumsum(np.append(0, 1 - (-beyond // steps))), steps)

    @property
    def _longest_question(self) -> int:
        return min(MAX_QUESTION, (self.length - 3) // 2)

    def features(self, example: Example, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Tokens [L], segments (1; padding 0), types (1 from the context on), and the columns of
        the answer's first and last token."""
        record, shift = example["record"], self.shift(example)
        question = record.tokens["question"][: self._longest_question]
        n_context = self.length - len(question) - 3
        context = record.tokens["context"][example["start"] :][:n_context]
        cls, sep = [self.special.cls], [self.special.sep]
        tokens = np.concatenate([cls, question, sep, context, sep])
        row = {name: np.zeros(*shape) for name, shape in self.shapes.items()}
        row["tokens"][: len(tokens)] = tokens
        row["segment_ids"][: len(tokens)] = 1
        row["types"][len(question) + 2 : len(tokens)] = 1
        start, end = (token + shift for token in answer_tokens(record))
        if len(question) + 2 <= start <= end < len(tokens) - 1:
            row["start"][...], row["end"][...] = start, end
        row["weight"][...] = 1
        return row

    def shift(self, example: Example) -> int:
        """The column of a window's token, less its number in the context."""
        n_question = min(len(example["record"].tokens["question"]), self._longest_question)
        return n_question + 2 - example["start"]

    def loss(self, model: Any, batch: Batch) -> LossSums:
        """Mean nats of start and end; accuracy is of both together."""
        scores_BL2, weight_B = self.predict(model, batch), batch["weight"]
        start = cross_entropy(scores_BL2[..., 0], batch["start"])
        end = cross_entropy(scores_BL2[..., 1], batch["end"])
        loss_B = (start.loss_BL + end.loss_BL) / 2
        right_B = start.correct_BL * end.correct_BL
        metrics = {"accuracy": (right_B * weight_B).sum()}
        return LossSums((loss_B * weight_B).sum(), weight_B.sum(), metrics)

    def predict(self, model: Any, batch: Batch) -> jax.Array:
        """Scores [B, L, 2] of starts and ends, float32: -inf but for [cls] and the context."""
        segments_BL, types_BL = batch["segment_ids"], batch["types"]
        x_BLD = model.hidden(batch["tokens"], None, segments_BL, types_BL)
        # Of what has type 1 the last token, [sep], is no context: only padding follows it.
        next_BL = jnp.pad(segments_BL[:, 1:], ((0, 0), (0, 1)))
        open_BL = (types_BL * next_BL).at[:, 0].set(1)
        return jnp.where(open_BL[..., None] == 1, model.spans(x_BLD), -jnp.inf)


def answer_tokens(record: Record) -> tuple[int, int]:
    """The first and the last token of the context with a character of the first answer.

    The last one is before the first if there is no answer, or no token has any of it.
    """
    if record.raw["is_impossible"]:
        return 0, -1
    assert record.starts is not None
    assert record.ends is not None
    answer = record.raw["answers"][0]
    first = np.searchsorted(record.ends, answer["start"], side="right")
    last = np.searchsorted(record.starts, answer["start"] + len(answer["text"])) - 1
    return int(first), int(last)
