"""Extractive question answering: predict where in a context the answer starts and ends.

Devlin et al. 2018, sections 4.2 and 4.3; contexts too long for a row are split into overlapping
windows.

Shape letters: B batch, L length, D model, N windows, W maximum answer length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lm.data.batches import Arrays, Example
from lm.data.record_store import Record, RecordStore
from lm.data.special_tokens import SpecialTokens, special_tokens
from lm.data.tokenizer import Tokenizer
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

MAX_QUESTION_TOKENS = 64  # as in BERT
MAX_ANSWER_TOKENS = 30  # as in BERT


@dataclass(frozen=True, eq=False)
class ContextWindows:
    """Context windows of a store's records, in order.

    Attributes:
        store: records.
        offsets: index of each record's first window, then the total number of windows; int [n + 1].
        strides: tokens between the starts of consecutive windows of a record; int [n].
    """

    store: RecordStore
    offsets: np.ndarray
    strides: np.ndarray

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def __getitem__(self, index: int) -> Example:
        """Return a record, and the index of the context token where the window starts."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        record = int(np.searchsorted(self.offsets, index, side="right")) - 1
        start = (index - self.offsets[record]) * self.strides[record]
        return {"record": self.store[record], "start": int(start)}


@dataclass(frozen=True)
class SpanQa(Objective[RecordStore, Example]):
    """Start and end of the answer in rows "[CLS] question [SEP] window of the context [SEP]".

    Windows start every `doc_stride` tokens until one reaches the end of the context. If a window
    does not contain the whole answer, or there is none, the answer starts and ends at [CLS].
    Questions are truncated to 64 tokens, or to half of a row if that is shorter.

    Attributes:
        length: row length L in tokens.
        doc_stride: tokens between the starts of consecutive windows.
        special: special token ids.
    """

    families: ClassVar = ("encoder", "decoder", "encoder_decoder")
    columns: ClassVar = ("question", "context", "answers")
    task: ClassVar = "predict"
    has_perplexity: ClassVar = False

    length: int
    doc_stride: int
    special: SpecialTokens

    def __post_init__(self) -> None:
        if self.length < 5:
            raise UserError(
                f"--config.data.sequence_length={self.length} leaves no room for question and "
                "context: use at least 5"
            )

    @classmethod
    def from_config(cls, config: ConfigDict, tokenizer: Tokenizer | None) -> SpanQa:
        data = config.data
        return cls(data.sequence_length, data.doc_stride, special_tokens(tokenizer))

    @property
    def shapes(self) -> Shapes:
        names = ("inputs", "segment_ids", "token_types")
        return {
            **dict.fromkeys(names, ((self.length,), "int32")),
            **dict.fromkeys(("start", "end"), ((), "int32")),
            "weights": ((), "float32"),
        }

    @property
    def n_extra_ids(self) -> int:  # type: ignore[override]
        return self.special.n_extra_ids(self.special.cls, self.special.sep)

    def examples(self, store: RecordStore, training: bool) -> ContextWindows:
        """Return all windows of all records."""
        self.require_columns(store)
        questions = np.minimum(store.lengths("question"), self._longest_question)
        room = self.length - 1 - self._n_before - questions
        strides = np.minimum(self.doc_stride, room)
        beyond = np.maximum(store.lengths("context") - room, 0)
        return ContextWindows(store, np.cumsum(np.append(0, 1 - (-beyond // strides))), strides)

    @property
    def _longest_question(self) -> int:
        return min(MAX_QUESTION_TOKENS, (self.length - 1 - self._n_before) // 2)

    @property
    def _n_before(self) -> int:
        """Number of special tokens before the context."""
        return 1 + len(self.special.between)

    def features(self, example: Example, rng: np.random.Generator) -> Arrays:
        """Return inputs, segment_ids (1; padding 0), token_types (1 from the context on) [L].

        "start" and "end" are the columns of the first and last answer token; "weights" is 1.
        """
        record, shift = example["record"], self._shift(example)
        question = record.tokens["question"][: self._longest_question]
        n_context = self.length - len(question) - 1 - self._n_before
        context = record.tokens["context"][example["start"] :][:n_context]
        cls, sep = [self.special.cls], [self.special.sep]
        tokens = np.concatenate([cls, question, self.special.between, context, sep])
        row = {name: np.zeros(*shape) for name, shape in self.shapes.items()}
        row["inputs"][: len(tokens)] = tokens
        row["segment_ids"][: len(tokens)] = 1
        row["token_types"][len(question) + self._n_before : len(tokens)] = 1
        start, end = (token + shift for token in answer_tokens(record))
        if len(question) + self._n_before <= start <= end < len(tokens) - 1:
            row["start"][...], row["end"][...] = start, end
        row["weights"][...] = 1
        return row

    def _shift(self, example: Example) -> int:
        """Return the offset from context token index to window column."""
        n_question = min(len(example["record"].tokens["question"]), self._longest_question)
        return n_question + self._n_before - example["start"]

    def loss(self, model: BoundModel, batch: Batch) -> LossSums:
        """Return the mean cross-entropy of start and end; accuracy requires both to be right."""
        scores_BL2, weights_B = self.predict(model, batch), batch["weights"]
        start = cross_entropy(scores_BL2[..., 0], batch["start"])
        end = cross_entropy(scores_BL2[..., 1], batch["end"])
        loss_B = (start.loss_BL + end.loss_BL) / 2
        correct_B = start.correct_BL * end.correct_BL
        metrics = {"accuracy": (correct_B * weights_B).sum()}
        return LossSums((loss_B * weights_B).sum(), weights_B.sum(), metrics)

    def predict(self, model: BoundModel, batch: Batch) -> jax.Array:
        """Return start and end scores [B, L, 2], -inf except at [CLS] and in the context."""
        segments_BL, types_BL = batch["segment_ids"], batch["token_types"]
        x_BLD = model.hidden(batch["inputs"], None, segments_BL, types_BL)
        # The last token of type 1, [SEP], is not part of the context: only padding follows it.
        next_BL = jnp.pad(segments_BL[:, 1:], ((0, 0), (0, 1)))
        open_BL = (types_BL * next_BL).at[:, 0].set(1)
        return jnp.where(open_BL[..., None] == 1, model.spans(x_BLD), -jnp.inf)

    # --- task

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("squad",)

    def answers(self, stores: Sequence[RecordStore], outputs: np.ndarray) -> list[Answer]:
        """Return the text of the best span over all windows of each record.

        If some question of the stores has no answer, a question whose [CLS] scores higher than its
        best span in every window gets the answer "".
        """
        may_lack = any(record.raw["is_impossible"] for store in stores for record in store)
        texts: list[Answer] = []
        for store in stores:
            windows = self.examples(store, training=False)
            scores_NL2, outputs = np.split(outputs, [len(windows)])
            texts += self._texts(windows, scores_NL2, may_lack)
        return texts

    def _texts(self, windows: ContextWindows, scores_NL2: np.ndarray, may_lack: bool) -> list[str]:
        """Return the answers to the questions of one store."""
        spans = [best_span(scores_L2) for scores_L2 in scores_NL2]
        no_answer_N = scores_NL2[:, 0].sum(-1)
        texts = []
        for first, stop in pairwise(windows.offsets):
            best = max(range(first, stop), key=lambda number: spans[number].score)
            threshold = no_answer_N[first:stop].min() if may_lack else -np.inf
            found = spans[best].score >= threshold and spans[best].score > -np.inf
            texts.append(self._text(windows[best], spans[best]) if found else "")
        return texts

    def _text(self, window: Example, span: Span) -> str:
        """Return the context text between two columns of a window."""
        record, shift = window["record"], self._shift(window)
        start, end = record.starts[span.start - shift], record.ends[span.end - shift]
        return record.raw["context"][start:end]

    def reference(self, record: Record) -> Reference:
        return [answer["text"] for answer in record.raw["answers"]]

    def require_columns(self, store: RecordStore) -> None:
        if "answers" not in store[0].raw:
            raise UserError(f"{store.manifest.source} has no answers: span_qa reads squad:FILE")


class Span(NamedTuple):
    """Best answer of a window: score, and columns of its first and last token.

    The score is -inf if the window has no context.
    """

    score: float
    start: int
    end: int


def best_span(scores_L2: np.ndarray) -> Span:
    """Return the best-scoring span of at most `MAX_ANSWER_TOKENS`, excluding [CLS].

    A span's score is the sum of its start and end scores.
    """
    starts_L, ends_L = scores_L2[1:].T
    padded = np.pad(ends_L, (0, MAX_ANSWER_TOKENS - 1), constant_values=-np.inf)
    ends_LW = np.lib.stride_tricks.sliding_window_view(padded, MAX_ANSWER_TOKENS)
    sums_LW = starts_L[:, None] + ends_LW
    start, extent = np.unravel_index(sums_LW.argmax(), sums_LW.shape)
    return Span(float(sums_LW[start, extent]), int(start) + 1, int(start + extent) + 1)


def answer_tokens(record: Record) -> tuple[int, int]:
    """Return the context indices of the first and last token of the first answer.

    These are the tokens that overlap with its characters. The last index is smaller than the first
    if there is no answer or no such token.
    """
    if record.raw["is_impossible"]:
        return 0, -1
    assert record.starts is not None
    assert record.ends is not None
    answer = record.raw["answers"][0]
    first = np.searchsorted(record.ends, answer["start"], side="right")
    last = np.searchsorted(record.starts, answer["start"] + len(answer["text"])) - 1
    return int(first), int(last)
