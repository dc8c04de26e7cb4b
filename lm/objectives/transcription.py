"""Transcription: predict the transcript of a recording, one per row (Radford et al. 2022).

Shape letters: B batch, S source positions of 20 ms, F = 2 S frames of 10 ms, M mel bins, T target
length.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, ClassVar

import numpy as np
from ml_collections import ConfigDict

from lm.data.audio.audio_inputs import LazySource
from lm.data.audio.log_mel import FRAMES_PER_POSITION, pad_frames
from lm.data.batches import Arrays, Example
from lm.data.record_store import Record, RecordStore
from lm.data.tokenizer import Tokenizer
from lm.errors import UserError
from lm.objectives.objective import Shapes
from lm.objectives.seq2seq import Seq2Seq


@dataclass(frozen=True)
class Transcription(Seq2Seq):
    """Next-token prediction of transcripts, which end with eos, from log-mel features.

    A recording is padded with silence to F frames, and the encoder attends to all of them, as
    in Whisper. In training SpecAugment (Park et al. 2019) may mask parts of it.

    Attributes:
        source_length: positions of the encoder, S.
        n_mels: mel bins, M.
        masks: number of time masks, and of frequency masks, that SpecAugment draws.
        mask_frames: maximum length of a time mask, in frames.
        mask_bins: maximum width of a frequency mask, in mel bins.
    """

    families: ClassVar = ("encoder_decoder",)
    columns: ClassVar = ("audio", "target")

    _: KW_ONLY
    n_mels: int = 80
    masks: int = 0
    mask_frames: int = 100
    mask_bins: int = 27

    @classmethod
    def from_config(cls, config: ConfigDict, tokenizer: Tokenizer | None) -> Transcription:
        n_mels, o = config.data.n_mels, config.objective
        if config.model.n_mels != n_mels:
            raise UserError(
                f"--config.objective.name=transcription reads --config.data.n_mels={n_mels} mel "
                f"bins: --config.model.n_mels={config.model.n_mels} must equal it"
            )
        given = Seq2Seq.from_config(config, tokenizer)
        common = {field.name: getattr(given, field.name) for field in fields(given)}
        augment = {"masks": o.masks, "mask_frames": o.mask_frames, "mask_bins": o.mask_bins}
        return cls(**common, n_mels=n_mels, **augment)

    @property
    def n_frames(self) -> int:
        """Number of frames per row, F."""
        return FRAMES_PER_POSITION * self.source_length

    @property
    def shapes(self) -> Shapes:
        return {**super().shapes, "source": ((self.n_frames, self.n_mels), "float32")}

    def examples(self, store: RecordStore, training: bool) -> HeardRecords:  # type: ignore[override]
        """Return one row per recording; transcripts that are too long are cut."""
        self.require_columns(store)
        return HeardRecords(store, training)

    def features(self, example: Example, rng: np.random.Generator) -> Arrays:
        """Return source [F, M] and inputs, targets, weights [T] with segments and positions."""
        row = {name: np.zeros(*shape) for name, shape in self.shapes.items()}
        record = example["record"]
        source, inputs, targets = self.pair(record)
        row["source"][:] = source
        if example["training"]:
            self.augment(row["source"], len(record.features["audio"]), rng)
        row["source_segments"][:] = 1
        row["source_positions"][:] = np.arange(self.source_length)
        n = len(targets)
        row["inputs"][:n], row["targets"][:n] = inputs, targets
        row["target_segments"][:n] = 1
        row["target_positions"][:n] = np.arange(n)
        row["weights"][len(self.prefix) : n] = 1
        return row

    def augment(self, source_FM: np.ndarray, n_heard: int, rng: np.random.Generator) -> None:
        """Mask spans of the first `n_heard` frames and bands of mel bins with 0, in place."""
        for _ in range(self.masks):
            start, stop = _stretch(n_heard, self.mask_frames, rng)
            source_FM[start:stop] = 0
            start, stop = _stretch(self.n_mels, self.mask_bins, rng)
            source_FM[:, start:stop] = 0

    def source(self, record: Record) -> Any:
        """Return the features of a recording, [F, M]."""
        return LazySource(
            self.n_frames, lambda: pad_frames(record.features["audio"], self.n_frames)
        )

    # --- task

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("wer", "cer")


@dataclass(frozen=True, eq=False)
class HeardRecords:
    """Recordings of a store, and whether they are used for training."""

    store: RecordStore
    training: bool

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"record": self.store[index], "training": self.training}


def _stretch(n: int, most: int, rng: np.random.Generator) -> tuple[int, int]:
    """Draw start and end of a span of up to `most` of n positions."""
    width = int(rng.integers(0, min(most, n) + 1))
    start = int(rng.integers(0, n - width + 1))
    return start, start + width
