"""Objective: the interface between data, model, training loop, evaluation and decoding.

An objective turns examples of a store into arrays of fixed shape (`features`), and a batch of
features into loss sums (`loss`). The trainer divides the global sums, so neither data parallelism
nor gradient accumulation changes the result. Whatever other code must know about an objective is an
attribute or method here; no code elsewhere checks its name.

Shape letters: B batch, L length, S source length, D model, V vocabulary, C classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import jax
import numpy as np
from ml_collections import ConfigDict

from lm.data.batches import Arrays, Examples
from lm.data.record_store import Record, RecordStore
from lm.data.store import TokenStore
from lm.data.tokenizer import Tokenizer
from lm.errors import UserError

Batch = Mapping[str, jax.Array]
Shapes = Mapping[str, tuple[tuple[int, ...], str]]
Answer = str | float
Reference = str | float | list[str]  # a list holds several correct answers

StoreT = TypeVar("StoreT", TokenStore, RecordStore)
ExampleT = TypeVar("ExampleT")


class OwnMean(NamedTuple):
    """Metric averaged over a subset of rows: its sum, and its own weight.

    Both are summed over batches like any metric. Division by the loss weight returns the mean by
    its own weight instead.
    """

    sum: jax.Array
    weight: jax.Array

    def __truediv__(self, weight: Any) -> Any:
        return self.sum / (self.weight + (self.weight == 0))


class LossSums(NamedTuple):
    """Sums over the targets of a batch.

    Attributes:
        loss: weighted loss; float32 scalar.
        weight: sum of target weights; float32 scalar.
        metrics: other metrics, weighted like the loss. "nll", if present, is the negative
            log-likelihood without label smoothing, z-loss and auxiliary losses; perplexity is
            computed from it, otherwise from the loss.
    """

    loss: jax.Array
    weight: jax.Array
    metrics: dict[str, Any]  # jax.Array or OwnMean


class LossConfig(Protocol):
    """Configuration field that the token loss reads."""

    @property
    def loss_chunk(self) -> int: ...


class BoundModel(Protocol):
    """Model bound to its parameters, as passed to `Objective.loss` and `Objective.predict`.

    A model family implements the methods that its objectives call.
    """

    @property
    def config(self) -> LossConfig: ...

    @property
    def deterministic(self) -> bool:
        """True without dropout, as in evaluation."""
        ...

    def __call__(self, *inputs: jax.Array) -> jax.Array:
        """Return the scores for the family's own inputs."""
        ...

    def hidden(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array | None = None,
        segment_ids_BL: jax.Array | None = None,
        token_types_BL: jax.Array | None = None,
        /,
        **more: jax.Array,
    ) -> jax.Array:
        """Return the last hidden states [B, L, D].

        Args:
            tokens_BL: token ids.
            positions_BL: positions; None: 0 … L-1.
            segment_ids_BL: segment ids that attention stays within; 0: padding. None: one segment.
            token_types_BL: token types; None: 0.
            **more: `prefix_BL`, 1 for prefix tokens; `fresh_B`, 1 where the carried state of a row
                is reset.
        """
        ...

    def decoder_hidden(
        self,
        source_BS: jax.Array,
        inputs_BL: jax.Array,
        source_segments_BS: jax.Array | None = None,
        target_segments_BL: jax.Array | None = None,
        source_positions_BS: jax.Array | None = None,
        target_positions_BL: jax.Array | None = None,
        /,
    ) -> jax.Array:
        """Return the last hidden states [B, L, D] of the decoder.

        Args:
            source_BS: source token ids.
            inputs_BL: decoder input token ids.
            source_segments_BS: segment ids of the sources; 0: padding. None: one segment.
            target_segments_BL: segment ids of the inputs; attention stays within a segment.
            source_positions_BS: source positions; None: 0 … S-1.
            target_positions_BL: input positions; None: 0 … L-1.
        """
        ...

    def logits(self, x_BLD: jax.Array, /) -> jax.Array:
        """Return the logits [B, L, V]."""
        ...

    def pooled(self, x_BLD: jax.Array, segment_ids_BL: jax.Array, /) -> jax.Array:
        """Return one vector per row, [B, D]."""
        ...

    def classify(self, x_BD: jax.Array, /) -> jax.Array:
        """Return class scores [B, C]."""
        ...

    def next_sentence(self, x_BD: jax.Array, /) -> jax.Array:
        """Return scores [B, 2] of "B follows A" and "B does not follow A"."""
        ...

    def generator_hidden(
        self, tokens_BL: jax.Array, positions_BL: jax.Array, segment_ids_BL: jax.Array, /
    ) -> jax.Array:
        """Return the last hidden states [B, L, W] of the ELECTRA generator."""
        ...

    def generator_logits(self, x_BLW: jax.Array, /) -> jax.Array:
        """Return the generator's logits [B, L, V]."""
        ...

    def replaced(self, x_BLD: jax.Array, /) -> jax.Array:
        """Return scores [B, L] of each token being a replacement."""
        ...

    def spans(self, x_BLD: jax.Array, /) -> jax.Array:
        """Return scores [B, L, 2] of each token as start and end of an answer."""
        ...


class Objective(ABC, Generic[StoreT, ExampleT]):
    """Training objective, built once from the configuration and the tokenizer.

    Features have the same names in every objective: "inputs" are the token ids that the model
    reads, "targets" those that it predicts, "weights" the weights of the targets (or of the row);
    "segment_ids", "positions" and "token_types" belong to the inputs.

    Attributes:
        families: supported values of `model.family`.
        columns: required record columns; () for an objective that trains on documents.
        task: how `lm eval --task` answers a record: "generate" decodes from `source`, "predict"
            uses the output of `predict`; "" if there is no task.
        has_perplexity: the loss is per predicted token, so exp(loss) is a perplexity.
        predicts_every_token: every token is a target once, so the loss of a whole split gives bits
            per byte and word perplexity.
        has_prefix: the decoder attends bidirectionally to the prefix of its input.
        length_keys: keys of section `data` that are sequence lengths.
        n_extra_ids: number of token ids beyond the tokenizer's.
        frozen: names of frozen models used by the loss (`lm/models/frozen.py`).
        precomputes: some features are computed by the model before training.
    """

    families: ClassVar[tuple[str, ...]]
    columns: ClassVar[tuple[str, ...]] = ()
    task: ClassVar[str] = ""
    has_perplexity: ClassVar[bool] = True
    predicts_every_token: ClassVar[bool] = False
    has_prefix: ClassVar[bool] = False
    length_keys: ClassVar[tuple[str, ...]] = ("sequence_length",)
    n_extra_ids: ClassVar[int] = 0
    frozen: ClassVar[tuple[str, ...]] = ()
    precomputes: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def from_config(cls, config: ConfigDict, tokenizer: Tokenizer | None) -> Objective:
        """Build the objective of a configuration.

        Args:
            config: configuration with resolved lengths.
            tokenizer: tokenizer of the data; None if only shapes and the loss, which do not depend
                on it, are needed.
        """

    @classmethod
    def attention_lengths(cls, config: ConfigDict) -> dict[str, int]:
        """Return the sequence lengths that attention sees, by description."""
        return {f"--config.data.{key}": config.data[key] for key in cls.length_keys}

    # --- data

    @property
    @abstractmethod
    def shapes(self) -> Shapes:
        """Shape and dtype of every feature, without the batch dimension."""

    @abstractmethod
    def examples(self, store: StoreT, training: bool) -> Examples[ExampleT]:
        """Return the examples of a store, in order.

        Args:
            store: token store, or store of records with `columns`.
            training: drop incomplete examples, and overlap them as configured; otherwise every
                target is in exactly one example.
        """

    @abstractmethod
    def features(self, example: ExampleT, rng: np.random.Generator) -> Arrays:
        """Return the arrays of one example, as in `shapes`; a pure function of its arguments."""

    # --- model

    @abstractmethod
    def loss(self, model: BoundModel, batch: Batch) -> LossSums:
        """Return the loss sums of a batch of features [B, …]; dropout is set in the model."""

    def predict(self, model: BoundModel, batch: Batch) -> jax.Array:
        """Return outputs [B, …] for `answers`; required for task "predict"."""
        raise NotImplementedError

    # --- task: answers to whole records (`lm eval --task`)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the task's default metrics."""
        return ()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes that `predict` scores, in order; () if there are none."""
        return ()

    def source(self, record: Record) -> np.ndarray:
        """Return the tokens from which the answer is decoded; required for task "generate"."""
        raise NotImplementedError

    def end_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Return additional token ids that end an answer; for task "generate"."""
        return ()

    def answers(self, stores: Sequence[StoreT], outputs: np.ndarray) -> list[Answer]:
        """Return the answer to each record of the stores; required for task "predict".

        Args:
            stores: stores of records.
            outputs: outputs of `predict` for all examples of all stores, [examples, …].
        """
        raise NotImplementedError

    def reference(self, record: Record) -> Reference:
        """Return the correct answer to a record, in the form that metrics expect."""
        raise NotImplementedError

    def require_columns(self, store: RecordStore) -> None:
        """Raise UserError if records of a store lack any of `columns`."""
        found = store[0].raw
        if missing := [name for name in self.columns if name not in found]:
            raise UserError(
                f"{store.manifest.source}: a record has no {missing[0]} (it has "
                f"{', '.join(found)}): name the columns of {', '.join(self.columns)} in "
                "--config.data.columns"
            )
