"""Base of denoising objectives: an encoder reads corrupted text, a decoder predicts targets.

Shape letters: B batch, S source length, T target length, D model.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from ml_collections import ConfigDict

from lm.data.batches import Arrays, Example
from lm.data.special_tokens import SpecialTokens, special_tokens
from lm.data.store import TokenStore, TokenWindows, token_windows
from lm.data.tokenizer import Tokenizer
from lm.objectives.losses import token_loss
from lm.objectives.objective import Batch, BoundModel, LossSums, Objective, Shapes


@dataclass(frozen=True, eq=False)
class Corruption(Objective[TokenStore, Example]):
    """Prediction of targets from a corrupted window of text.

    As in T5, a window is treated as one text regardless of document boundaries, and the decoder
    starts with pad if there is no bos.

    Attributes:
        tokenizer: tokenizer of the data, or None.
        length: source length S in tokens.
        stride: tokens between the starts of consecutive training windows; 0: the window length.
        label_smoothing: probability mass spread over the vocabulary.
        z_loss: weight of the squared log-partition function.
    """

    families: ClassVar = ("encoder_decoder",)

    tokenizer: Tokenizer | None
    length: int
    _: KW_ONLY
    stride: int = 0
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    @classmethod
    def attention_lengths(cls, config: ConfigDict) -> dict[str, int]:
        (length,), _ = cls.from_config(config, None).shapes["targets"]
        return super().attention_lengths(config) | {f"targets of {config.objective.name}": length}

    @property
    @abstractmethod
    def lengths(self) -> tuple[int, int]:
        """Tokens per window, and maximum target length T."""

    @abstractmethod
    def corrupt(
        self, tokens: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Corrupt the tokens of a window; return source and targets, at most S and T tokens."""

    @property
    def shapes(self) -> Shapes:
        source, target = (self.length,), (self.lengths[1],)
        return {
            **dict.fromkeys(("source", "source_segments"), (source, "int32")),
            **dict.fromkeys(("inputs", "targets", "target_segments"), (target, "int32")),
            "weights": (target, "float32"),
        }

    def examples(self, store: TokenStore, training: bool) -> TokenWindows:
        """Return windows with enough tokens to fill a source."""
        n = self.lengths[0]
        stride = self.stride if training and self.stride else n
        return token_windows(store, n - 1, stride, False, training)

    def features(self, example: Example, rng: np.random.Generator) -> Arrays:
        """Return source, source_segments [S]; inputs, targets, target_segments, weights [T]."""
        tokens = example["tokens"][: np.count_nonzero(example["segment_ids"])]
        source, targets = self.corrupt(tokens, rng)
        values = {
            "source": source,
            "source_segments": np.ones(len(source)),
            "inputs": np.append(self.special.bos, targets[:-1]),
            "targets": targets,
            "target_segments": np.ones(len(targets)),
            "weights": np.ones(len(targets)),
        }
        features = {name: np.zeros(*shape) for name, shape in self.shapes.items()}
        for name, value in values.items():
            features[name][: len(value)] = value
        return features

    @cached_property
    def special(self) -> SpecialTokens:
        """Special tokens of the tokenizer."""
        return special_tokens(self.tokenizer)

    def loss(self, model: BoundModel, batch: Batch) -> LossSums:
        """Return the cross-entropy of every target token, including eos."""
        x_BTD = model.decoder_hidden(
            batch["source"], batch["inputs"], batch["source_segments"], batch["target_segments"]
        )
        targets, weights = batch["targets"], batch["weights"]
        return token_loss(model, x_BTD, targets, weights, self.label_smoothing, self.z_loss)
