"""Causal language modelling: every token predicts the next one of its document.

Shape letters: B batch, L length, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lm.kernels.cross_entropy import cross_entropy
from lm.objectives.objective import Apply, Batch, Example, Sums


@dataclass(frozen=True)
class Causal:
    """With `isolate_documents`, attention, positions and targets stay within a document."""

    isolate_documents: bool

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
        return features

    def loss(self, apply: Apply, batch: Batch) -> Sums:
        """Nats of every target, and how many were predicted right."""
        logits_BLV = apply(batch["inputs"], batch.get("positions"), batch.get("segment_ids"))
        weights_BL = batch["weights"]
        nats_BL = cross_entropy(logits_BLV, batch["targets"])
        right_BL: jax.Array = logits_BLV.argmax(-1) == batch["targets"]
        return Sums(
            loss=(nats_BL * weights_BL).sum(),
            weight=weights_BL.sum(),
            metrics={"accuracy": jnp.where(right_BL, weights_BL, 0).sum()},
        )
