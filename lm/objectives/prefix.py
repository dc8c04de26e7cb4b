"""Prefix language modelling: a document's start is read both ways, its rest is predicted.

Raffel 2020, section 3.2.1 and figure 3; Dong 2019 (UniLM) calls it sequence-to-sequence masks.

Shape letters: B batch, L length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lm.data.store import TokenStore
from lm.data.windows import TokenWindows, token_windows
from lm.objectives.objective import Batch, Example, LossSums
from lm.objectives.token_loss import token_loss


@dataclass(frozen=True)
class Prefix:
    """Each document of a window is cut at random, or the window if documents are not isolated.

    The prefix of n input tokens is 1 … n of them, all lengths equally likely. The first target is
    the token after the prefix.
    """

    length: int
    stride: int = 0  # 0: windows adjoin
    isolate_documents: bool = True
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    @property
    def n_extra_ids(self) -> int:
        return 0

    @property
    def shapes(self) -> Mapping[str, tuple[tuple[int, ...], str]]:
        names = ("inputs", "targets", "segment_ids", "positions", "prefix")
        row = (self.length,)
        return {**dict.fromkeys(names, (row, "int32")), "weights": (row, "float32")}

    def examples(self, store: TokenStore, training: bool) -> TokenWindows:
        """Windows of L + 1 tokens."""
        stride = self.stride if training and self.stride else self.length
        return token_windows(store, self.length, stride, self.isolate_documents, training)

    def features(self, example: Example, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Inputs, targets, weights, segments, positions [L]; prefix is 1 for tokens of prefixes."""
        tokens = example["tokens"]
        segments, positions = example["segment_ids"][:-1], example["positions"][:-1]
        sizes = np.bincount(segments)
        sizes[0] = 0  # padding
        prefixes = rng.integers(np.minimum(sizes, 1), sizes + 1)[segments]
        return {
            "inputs": tokens[:-1],
            "targets": tokens[1:],
            "weights": np.where(positions + 1 < prefixes, np.float32(0), example["weights"]),
            "segment_ids": segments,
            "positions": positions,
            "prefix": (positions < prefixes).astype(np.int32),
        }

    def loss(self, model: Any, batch: Batch) -> LossSums:
        """Nats of every target after a prefix, and how many were predicted right."""
        x_BLD = model.hidden(
            batch["inputs"], batch["positions"], batch["segment_ids"], prefix_BL=batch["prefix"]
        )
        targets, weights = batch["targets"], batch["weights"]
        return token_loss(model, x_BLD, targets, weights, self.label_smoothing, self.z_loss)
