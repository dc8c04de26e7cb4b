"""Objective: the interface between data, model, training loop, evaluation and decoding.

An objective turns the examples of a store into arrays of fixed shape (`features`), and a batch of
them into sums of losses (`loss`). The trainer divides the global sums, so that neither data
parallelism nor gradient accumulation changes the result. What other parts of the library must
know of an objective is an attribute or a method here: no code elsewhere compares its name.

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
Reference = str | float | list[str]  # a list has several right answers

StoreT = TypeVar("StoreT", TokenStore, RecordStore)
ExampleT = TypeVar("ExampleT")


class OwnMean(NamedTuple):
    """Figure that is a mean over some rows alone: its sum, and its own weight.

    It is summed over batches like any figure; divided by the weight of the loss, it is the mean by
    its own weight.
    """

    sum: jax.Array
    weight: jax.Array

    def __truediv__(self, weight: Any) -> Any:
        return self.sum / (self.weight + (self.weight == 0))


class LossSums(NamedTuple):
    """Sums over the targets of a batch.

    Attributes:
        loss: loss, weighted; float32 scalar.
        weight: weights of the targets; float32 scalar.
        metrics: other figures, weighted like the loss. "nll" is the negative log-likelihood
            without label smoothing, z-loss and auxiliary losses: perplexity is computed from it
            where it is there, and else from the loss.
    """

    loss: jax.Array
    weight: jax.Array
    metrics: dict[str, Any]  # jax.Array or OwnMean


class LossConfig(Protocol):
    """Field of a model's configuration that the token loss reads."""

    @property
    def loss_chunk(self) -> int: ...


class BoundModel(Protocol):
    """Model bound to its parameters, as `Objective.loss` and `Objective.predict` receive it.

    A model family has the methods that the objectives of that family call.
    """

    @property
    def config(self) -> LossConfig: ...

    @property
    def deterministic(self) -> bool:
        """True without dropout, as in evaluation."""
        ...

    def __call__(self, *inputs: jax.Array) -> jax.Array:
        """Return the scores of the family's own inputs."""
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
            segment_ids_BL: segments that attention stays within, 0 is padding; None: one a row.
            token_types_BL: token types; None: 0.
            **more: `prefix_BL`, 1 for tokens of a prefix; `fresh_B`, 1 where the carried state of
                a row starts anew.
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
            source_BS: token ids of the sources.
            inputs_BL: token ids of the decoder's inputs.
            source_segments_BS: segments of the sources, 0 is padding; None: one a row.
            target_segments_BL: segments of the inputs; attention stays within a segment.
            source_positions_BS: positions of the sources; None: 0 … S-1.
            target_positions_BL: positions of the inputs; None: 0 … L-1.
        """
        ...

    def logits(self, x_BLD: jax.Array, /) -> jax.Array:
        """Return the scores [B, L, V] of the vocabulary."""
        ...

    def pooled(self, x_BLD: jax.Array, segment_ids_BL: jax.Array, /) -> jax.Array:
        """Return one vector a row, [B, D]."""
        ...

    def classify(self, x_BD: jax.Array, /) -> jax.Array:
        """Return the scores [B, C] of the classes."""
        ...

    def next_sentence(self, x_BD: jax.Array, /) -> jax.Array:
        """Return the scores [B, 2] of "B follows A" and "B does not follow A"."""
        ...

    def generator_hidden(
        self, tokens_BL: jax.Array, positions_BL: jax.Array, segment_ids_BL: jax.Array, /
    ) -> jax.Array:
        """Return the last hidden states [B, L, W] of the generator of tokens to detect."""
        ...

    def generator_logits(self, x_BLW: jax.Array, /) -> jax.Array:
        """Return the generator's scores [B, L, V] of the vocabulary."""
        ...

    def replaced(self, x_BLD: jax.Array, /) -> jax.Array:
        """Return the scores [B, L] of each token as one that was replaced."""
        ...

    def spans(self, x_BLD: jax.Array, /) -> jax.Array:
        """Return the scores [B, L, 2] of each token as start and as end of an answer."""
        ...


class Objective(ABC, Generic[StoreT, ExampleT]):
    """Training objective, built once from the configuration and the tokenizer.

    Features that mean the same have the same name in every objective: "inputs" are the tokens
    that the model reads, "targets" those that it predicts, "weights" the weights of the targets
    (or of the row), "segment_ids", "positions" and "token_types" belong to the inputs.

    Attributes:
        families: values of `model.family` that it trains.
        columns: columns that its records have; () for an objective that reads documents.
        task: how `lm eval --task` gets the answer to a record: "generate" decodes `source`,
            "predict" reads the output of `predict`; "" if there is no task.
        has_perplexity: the loss is that of predicted tokens, so that exp(loss) is a perplexity.
        predicts_every_token: every token of the text is a target once, so that the loss of a
            whole split gives bits a byte and the perplexity of a word.
        has_prefix: the decoder attends to the prefix of its input in both directions.
        length_keys: keys of the section `data` that are lengths of its sequences.
        n_extra_ids: number of token ids beyond those of the tokenizer.
        frozen: names of the frozen models that its loss compares with (`lm/models/frozen.py`).
        precomputes: features of its examples are computed by the model before training.
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
            config: configuration; lengths are resolved.
            tokenizer: tokenizer of the data. None if only shapes and the loss are needed, which
                do not depend on it.
        """

    @classmethod
    def attention_lengths(cls, config: ConfigDict) -> dict[str, int]:
        """Return the lengths of the sequences that attention sees, by what they are."""
        return {f"--config.data.{key}": config.data[key] for key in cls.length_keys}

    # --- data

    @property
    @abstractmethod
    def shapes(self) -> Shapes:
        """Shape and dtype of every feature, without the batch dimension."""

    @abstractmethod
    def examples(self, store: StoreT, training: bool) -> Examples[ExampleT]:
        """Return the examples of a store, in the store's order.

        Args:
            store: token store, or store of records that have `columns`.
            training: leave out what does not fill an example, and overlap examples as configured;
                otherwise every target is in one example.
        """

    @abstractmethod
    def features(self, example: ExampleT, rng: np.random.Generator) -> Arrays:
        """Return the arrays of one example, of `shapes`; a pure function of its arguments."""

    # --- model

    @abstractmethod
    def loss(self, model: BoundModel, batch: Batch) -> LossSums:
        """Return the sums of a batch of features, [B, …]; dropout is set in the model."""

    def predict(self, model: BoundModel, batch: Batch) -> jax.Array:
        """Return the outputs [B, …] that `answers` reads; for the task "predict"."""
        raise NotImplementedError

    # --- task: scores of whole records (`lm eval --task`)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics by which the task is usually scored."""
        return ()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes that `predict` scores, in order; () if it scores none."""
        return ()

    def source(self, record: Record) -> np.ndarray:
        """Return the tokens from which the answer is decoded; for the task "generate"."""
        raise NotImplementedError

    def end_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Return tokens that end an answer beside those that end any text; for "generate"."""
        return ()

    def answers(self, stores: Sequence[StoreT], outputs: np.ndarray) -> list[Answer]:
        """Return the answer to each record of the stores; for the task "predict".

        Args:
            stores: stores of records.
            outputs: outputs of `predict` for all examples of all stores, [examples, …].
        """
        raise NotImplementedError

    def reference(self, record: Record) -> Reference:
        """Return the right answer to a record, as metrics take it."""
        raise NotImplementedError

    def require_columns(self, store: RecordStore) -> None:
        """Raise UserError unless the records of a store have all `columns`."""
        found = store[0].raw
        if missing := [name for name in self.columns if name not in found]:
            raise UserError(
                f"{store.manifest.source}: a record has no {missing[0]} (it has "
                f"{', '.join(found)}): name the columns of {', '.join(self.columns)} in "
                "--config.data.columns"
            )
