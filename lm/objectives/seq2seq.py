"""Sequence to sequence: predict a target text from a source text, with several pairs per row.

Shape letters: B batch, S source length, T target length, D model.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import numpy as np
from ml_collections import ConfigDict

from lm.data.batches import Arrays, Example
from lm.data.record_store import PackedRecords, Record, RecordStore, pack_records
from lm.data.special_tokens import SpecialTokens, special_tokens, target_start
from lm.data.tokenizer import Tokenizer
from lm.errors import UserError
from lm.objectives.losses import token_loss
from lm.objectives.objective import Batch, BoundModel, LossSums, Objective, Reference, Shapes

SOURCE_FEATURES = ("source", "source_segments", "source_positions")
TARGET_FEATURES = ("inputs", "targets", "target_segments", "target_positions")


@dataclass(frozen=True)
class Seq2Seq(Objective[RecordStore, Example]):
    """Next-token prediction of targets, which end with eos; attention stays within a pair.

    Attributes:
        source_length: source tokens per row, S.
        target_length: target tokens per row, T.
        special: special token ids.
        prefix: ids that start each target, with weight 0.
        pack: pack several pairs into a row.
        label_smoothing: probability mass spread over the vocabulary.
        z_loss: weight of the squared log-partition function.
        seed: seed of the packing order.
    """

    families: ClassVar[tuple[str, ...]] = ("encoder_decoder", "lstm_encoder_decoder")
    columns: ClassVar = ("source", "target")
    task: ClassVar = "generate"
    length_keys: ClassVar = ("sequence_length", "target_length")

    source_length: int
    target_length: int
    special: SpecialTokens
    _: KW_ONLY
    prefix: tuple[int, ...] = ()
    pack: bool = True
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    seed: int = 0

    @classmethod
    def from_config(cls, config: ConfigDict, tokenizer: Tokenizer | None) -> Seq2Seq:
        _, *prefix = target_start(tokenizer, config.data.target_prefix)
        if len(prefix) >= config.data.target_length:
            raise UserError(
                f"--config.data.target_length={config.data.target_length} has no room for the "
                f"{len(prefix)} tokens of --config.data.target_prefix and the end of a target"
            )
        return cls(
            config.data.sequence_length,
            config.data.target_length,
            special_tokens(tokenizer),
            prefix=tuple(prefix),
            pack=config.data.pack,
            label_smoothing=config.objective.label_smoothing,
            z_loss=config.objective.z_loss,
            seed=config.seed,
        )

    @property
    def shapes(self) -> Shapes:
        return {
            **dict.fromkeys(SOURCE_FEATURES, ((self.source_length,), "int32")),
            **dict.fromkeys(TARGET_FEATURES, ((self.target_length,), "int32")),
            "weights": ((self.target_length,), "float32"),
        }

    @property
    def n_extra_ids(self) -> int:  # type: ignore[override]
        return self.special.n_extra_ids(self.special.bos, self.special.eos)

    def examples(self, store: RecordStore, training: bool) -> PackedRecords:
        """Return rows of packed pairs; a pair that is too long is truncated to one row."""
        self.require_columns(store)
        around = self.special.around_source
        more = len(around.before) + len(around.after), 1 + len(self.prefix)
        lengths = np.stack([store.lengths("source"), store.lengths("target")], axis=1) + more
        limits = (self.source_length, self.target_length)
        if not self.pack:
            lengths[:] = limits
        return PackedRecords(store, pack_records(lengths, limits, self.seed))

    def features(self, example: Example, rng: np.random.Generator) -> Arrays:
        """Return source [S] and inputs, targets, weights [T], with segment ids and positions.

        Segments number the pairs of a row from 1; 0 is padding.
        """
        row = {name: np.zeros(*shape) for name, shape in self.shapes.items()}
        source_end = target_end = 0
        for segment, record in enumerate(example["records"], start=1):
            source, inputs, targets = self.pair(record)
            here = slice(source_end, source_end := source_end + len(source))
            there = slice(target_end, target_end := target_end + len(targets))
            row["source"][here] = source
            row["inputs"][there], row["targets"][there] = inputs, targets
            row["source_segments"][here] = row["target_segments"][there] = segment
            row["source_positions"][here] = np.arange(len(source))
            row["target_positions"][there] = np.arange(len(targets))
            row["weights"][there][len(self.prefix) :] = 1
        return row

    def pair(self, record: Record) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return source, decoder inputs and targets of a record."""
        source = self.source(record)
        kept = record.tokens["target"][: self.target_length - 1 - len(self.prefix)]
        inputs = np.concatenate([[self.special.bos], self.prefix, kept]).astype(np.int32)
        return source, inputs, np.append(inputs[1:], self.special.eos)

    def source(self, record: Record) -> np.ndarray:
        """Return the encoder input: the source, followed by eos or in the tokenizer's template."""
        return self.special.source(record.tokens["source"], self.source_length)

    def loss(self, model: BoundModel, batch: Batch) -> LossSums:
        """Return the cross-entropy of every target token, including eos."""
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

    # --- task

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("bleu", "exact_match")

    def reference(self, record: Record) -> Reference:
        return record.raw["target"]
