"""Sequence to sequence: a target text given a source text, several pairs to a row.

Shape letters: B batch, S source length, T target length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lm.data.records.record_packing import Packs, pack_records
from lm.data.records.record_store import Record, RecordStore
from lm.objectives.columns import require_columns
from lm.objectives.objective import Batch, Example, LossSums
from lm.objectives.special_tokens import SpecialTokens
from lm.objectives.token_loss import token_loss


@dataclass(frozen=True, eq=False)
class Rows:
    """The pairs of a store, as many to a row as `packs` says."""

    store: RecordStore
    packs: Packs

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> Example:
        return {"records": [self.store[int(i)] for i in self.packs[index]]}


@dataclass(frozen=True)
class Seq2Seq:
    """Targets are predicted token by token and end with eos; attention stays within a pair."""

    source_length: int
    target_length: int
    special: SpecialTokens
    pack: bool = True
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    seed: int = 0

    @property
    def shapes(self) -> Mapping[str, tuple[tuple[int, ...], str]]:
        return {
            **dict.fromkeys(SOURCE, ((self.source_length,), "int32")),
            **dict.fromkeys(TARGET, ((self.target_length,), "int32")),
            "weights": ((self.target_length,), "float32"),
        }

    @property
    def n_extra_ids(self) -> int:
        return self.special.n_extra_ids(self.special.bos, self.special.eos)

    def examples(self, store: RecordStore, training: bool) -> Sequence[Example]:
        """Rows of pairs that together fit; a pair too long for a row is cut to it."""
        require_columns(store, "source", "target")
        lengths = np.stack([store.lengths("source"), store.lengths("target")], axis=1) + 1
        limits = (self.source_length, self.target_length)
        if not self.pack:
            lengths[:] = limits
        return Rows(store, pack_records(lengths, limits, self.seed))  # type: ignore[return-value]

    def features(self, example: Example, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """A row: sources and inputs, each with segments from 1 and positions, and targets."""
        row = {name: np.zeros(*shape) for name, shape in self.shapes.items()}
        at_source = at_target = 0
        for segment, record in enumerate(example["records"], start=1):
            source, inputs, targets = self.pair(record)
            here = slice(at_source, at_source := at_source + len(source))
            there = slice(at_target, at_target := at_target + len(targets))
            row["source"][here], row["inputs"][there], row["targets"][there] = (
                source,
                inputs,
                targets,
            )
            row["source_segments"][here] = row["target_segments"][there] = segment
            row["source_positions"][here] = np.arange(len(source))
            row["target_positions"][there] = np.arange(len(targets))
            row["weights"][there] = 1
        return row

    def pair(self, record: Record) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Source, decoder inputs and targets of one record."""
        source = self.source(record)
        target = np.append(record.tokens["target"][: self.target_length - 1], self.special.eos)
        return source, np.append(self.special.bos, target[:-1]), target

    def source(self, record: Record) -> np.ndarray:
        """What the encoder reads: the source and eos."""
        return np.append(record.tokens["source"][: self.source_length - 1], self.special.eos)

    def loss(self, model: Any, batch: Batch) -> LossSums:
        """Nats of every target, with label smoothing if asked for, and accuracy."""
        x_BTD = model.decoder_hidden(
            batch["source"],
            batch["inputs"],
            batch["source_segments"],
            batch["target_segments"],
            batch["source_positions"],
            batch["target_positions"],
        )
        targets, weights = batch["targets"], batch["weights"]
        return token_loss(model, x_BTD, targets, weights, self.label_smoothing, self.z_loss)


SOURCE = ("source", "source_segments", "source_positions")
TARGET = ("inputs", "targets", "target_segments", "target_positions")
