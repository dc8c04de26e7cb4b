"""Causal language modelling: every token predicts the next one of its document.

Shape letters: B batch, L length.
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
class Causal:
    """With `isolate_documents`, attention, positions and targets stay within a document.

    With `carry` the model goes on from its state after the batch before.
    """

    length: int
    stride: int
    isolate_documents: bool
    carry: bool = False
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    @property
    def shapes(self) -> Mapping[str, tuple[tuple[int, ...], str]]:
        names = ["inputs", "targets"]
        names += ["segment_ids", "positions"] if self.isolate_documents else []
        shapes = dict.fromkeys(names, ((self.length,), "int32"))
        fresh = {"fresh": ((), "int32")} if self.carry else {}
        return {**shapes, **fresh, "weights": ((self.length,), "float32")}

    @property
    def n_extra_ids(self) -> int:
        return 0

    def examples(self, store: TokenStore, training: bool) -> TokenWindows:
        """Windows of L + 1 tokens."""
        stride = (self.stride or self.length) if training else self.length
        return token_windows(store, self.length, stride, self.isolate_documents, training)

    def features(self, example: Example, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """From a window of L + 1 tokens: inputs, targets, weights, segments and positions [L]."""
        tokens, segments = example["tokens"], example["segment_ids"]
        features = {
            "inputs": tokens[:-1],
            "targets": tokens[1:],
            "weights": example["weights"],
        }
        if self.isolate_documents:
            features |= {"segment_ids": segments[:-1], "positions": example["positions"][:-1]}
        if self.carry:
            features["fresh"] = np.asarray(example.get("fresh", 0), np.int32)
        return features

    def loss(self, model: Any, batch: Batch) -> LossSums:
        """Nats of every target, and how many were predicted right."""
        carried = {"fresh_B": batch["fresh"]} if self.carry else {}
        x_BLD = model.hidden(
            batch["inputs"], batch.get("positions"), batch.get("segment_ids"), **carried
        )
        targets, weights = batch["targets"], batch["weights"]
        return token_loss(model, x_BLD, targets, weights, self.label_smoothing, self.z_loss)
