"""Prefix language modeling: read the start of a document bidirectionally, and predict the rest.

Raffel et al. 2020, section 3.2.1 and figure 3; Dong et al. 2019 (UniLM) call its attention
sequence-to-sequence masks.

Shape letters: B batch, L length, D model.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import numpy as np
from ml_collections import ConfigDict

from lm.data.batches import Arrays, Example
from lm.data.store import TokenStore, TokenWindows, token_windows
from lm.data.tokenizer import Tokenizer
from lm.objectives.losses import token_loss
from lm.objectives.objective import Batch, BoundModel, LossSums, Objective, Shapes


@dataclass(frozen=True)
class Prefix(Objective[TokenStore, Example]):
    """Next-token prediction after a random prefix of each document in a window.

    Without `isolate_documents` the whole window has one prefix. The prefix length is uniform over 1
    … n for n input tokens. The first target is the token after the prefix. Attributes are those of
    `Causal`.
    """

    families: ClassVar = ("decoder",)
    has_prefix: ClassVar = True

    length: int
    _: KW_ONLY
    stride: int = 0
    isolate_documents: bool = True
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    @classmethod
    def from_config(cls, config: ConfigDict, tokenizer: Tokenizer | None) -> Prefix:
        return cls(
            config.data.sequence_length,
            stride=config.data.stride,
            isolate_documents=config.data.isolate_documents,
            label_smoothing=config.objective.label_smoothing,
            z_loss=config.objective.z_loss,
        )

    @property
    def shapes(self) -> Shapes:
        names = ("inputs", "targets", "segment_ids", "positions", "prefix")
        row = (self.length,)
        return {**dict.fromkeys(names, (row, "int32")), "weights": (row, "float32")}

    def examples(self, store: TokenStore, training: bool) -> TokenWindows:
        """Return windows of L + 1 tokens."""
        stride = self.stride if training and self.stride else self.length
        return token_windows(store, self.length, stride, self.isolate_documents, training)

    def features(self, example: Example, rng: np.random.Generator) -> Arrays:
        """Return arrays [L]; "prefix" is 1 for prefix tokens, else 0."""
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

    def loss(self, model: BoundModel, batch: Batch) -> LossSums:
        """Return the cross-entropy of every token after a prefix."""
        x_BLD = model.hidden(
            batch["inputs"], batch["positions"], batch["segment_ids"], prefix_BL=batch["prefix"]
        )
        targets, weights = batch["targets"], batch["weights"]
        return token_loss(model, x_BLD, targets, weights, self.label_smoothing, self.z_loss)
