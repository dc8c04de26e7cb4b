"""Causal language modeling: predict every token of a document from the tokens before it.

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
class Causal(Objective[TokenStore, Example]):
    """Next-token prediction in windows of a text.

    Attributes:
        length: window length L in tokens.
        stride: tokens between the starts of consecutive training windows; 0: `length`.
        isolate_documents: attention, positions and targets stay within a document.
        carry: the model continues from its state after the previous batch.
        label_smoothing: probability mass spread over the vocabulary.
        z_loss: weight of the squared log-partition function.
    """

    families: ClassVar = ("decoder", "lstm", "nplm")
    predicts_every_token: ClassVar = True

    length: int
    _: KW_ONLY
    stride: int = 0
    isolate_documents: bool = True
    carry: bool = False
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    @classmethod
    def from_config(cls, config: ConfigDict, tokenizer: Tokenizer | None) -> Causal:
        return cls(
            config.data.sequence_length,
            stride=config.data.stride,
            isolate_documents=config.data.isolate_documents,
            carry=config.model.carry,
            label_smoothing=config.objective.label_smoothing,
            z_loss=config.objective.z_loss,
        )

    @property
    def shapes(self) -> Shapes:
        names = ["inputs", "targets"]
        names += ["segment_ids", "positions"] if self.isolate_documents else []
        shapes = dict.fromkeys(names, ((self.length,), "int32"))
        fresh = {"fresh": ((), "int32")} if self.carry else {}
        return {**shapes, **fresh, "weights": ((self.length,), "float32")}

    def examples(self, store: TokenStore, training: bool) -> TokenWindows:
        """Return windows of L + 1 tokens."""
        stride = self.stride if training and self.stride else self.length
        return token_windows(store, self.length, stride, self.isolate_documents, training)

    def features(self, example: Example, rng: np.random.Generator) -> Arrays:
        """Return inputs, targets, weights [L], and if used segment_ids, positions, fresh."""
        features = {
            "inputs": example["tokens"][:-1],
            "targets": example["tokens"][1:],
            "weights": example["weights"],
        }
        if self.isolate_documents:
            features |= {name: example[name][:-1] for name in ("segment_ids", "positions")}
        if self.carry:
            features["fresh"] = np.asarray(example.get("fresh", 0), np.int32)
        return features

    def loss(self, model: BoundModel, batch: Batch) -> LossSums:
        """Return the cross-entropy of every next token."""
        carried = {"fresh_B": batch["fresh"]} if self.carry else {}
        x_BLD = model.hidden(
            batch["inputs"], batch.get("positions"), batch.get("segment_ids"), **carried
        )
        targets, weights = batch["targets"], batch["weights"]
        return token_loss(model, x_BLD, targets, weights, self.label_smoothing, self.z_loss)
