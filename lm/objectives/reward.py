"""Reward model: a scalar score per completion, trained to be higher for the chosen one of a pair.

A row holds both sequences as in `preferences.py`; the head reads the last token of each.

Shape letters: B batch, L length, P the two halves of a row, D model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import softplus
from ml_collections import ConfigDict

from lm.data.batches import Arrays
from lm.data.files import tell_once
from lm.data.record_store import Record, RecordStore
from lm.data.tokenizer import Tokenizer
from lm.errors import UserError
from lm.objectives.objective import Batch, BoundModel, LossSums, Objective, Shapes
from lm.objectives.preferences import HALVES, in_halves, pair_metrics


@dataclass(frozen=True)
class Reward(Objective[RecordStore, Record]):
    """Pairwise reward (Bradley and Terry 1952; Ouyang et al. 2022, eq. 1).

    The loss is -log σ(chosen - rejected - margin), where the margin is given by the record or 0
    (Touvron et al. 2023, eq. 2). Records with a sequence longer than L tokens are dropped.

    Attributes:
        length: maximum length L of a prompt with its completion, in tokens.
        centering: weight of the squared sum of both rewards (Eisenstein et al. 2023, eq. 2).
    """

    families: ClassVar = ("decoder",)
    columns: ClassVar = ("chosen", "rejected")
    has_perplexity: ClassVar = False

    length: int
    centering: float = 0.0

    @classmethod
    def from_config(cls, config: ConfigDict, tokenizer: Tokenizer | None) -> Reward:
        if config.model.n_classes > 1:
            raise UserError(
                f"--config.model.n_classes={config.model.n_classes}: a reward is one number"
            )
        return cls(config.data.sequence_length, config.objective.reward_centering)

    @classmethod
    def attention_lengths(cls, config: ConfigDict) -> dict[str, int]:
        lengths = super().attention_lengths(config)
        return {f"twice {key}": HALVES * length for key, length in lengths.items()}

    @property
    def shapes(self) -> Shapes:
        row = ((HALVES * self.length,), "int32")
        numbers = dict.fromkeys(("margin", "weights"), ((), "float32"))
        return {**dict.fromkeys(("inputs", "segment_ids", "positions"), row), **numbers}

    def examples(self, store: RecordStore, training: bool) -> RecordStore:
        """Return the records whose sequences both fit."""
        self.require_columns(store)
        prompt = store.lengths("prompt")
        longest = prompt + np.maximum(store.lengths("chosen"), store.lengths("rejected"))
        fits = longest <= self.length
        if not fits.any():
            raise UserError(
                f"{store.manifest.source}: every record has more tokens than "
                f"--config.data.sequence_length={self.length}"
            )
        if n := int((~fits).sum()):
            left_out = f"skipped {n} of {len(store)} records, which are too long"
            tell_once(left_out, store.manifest.source)
        return store.select(np.flatnonzero(fits))

    def features(self, example: Record, rng: np.random.Generator) -> Arrays:
        """Return inputs, segment_ids and positions [2L] with each half padded; margin; weight 1."""
        tokens = example.tokens
        whole = [np.concatenate([tokens["prompt"], tokens[k]]) for k in ("chosen", "rejected")]
        margin = np.asarray(example.raw.get("margin", 0.0), np.float32)
        return {**self.row(whole), "margin": margin, "weights": np.ones((), np.float32)}

    def row(self, sequences: list[np.ndarray]) -> Arrays:
        """Return inputs, segment_ids, positions [2L] of up to two left-truncated sequences."""
        arrays = {
            name: np.zeros(HALVES * self.length, np.int32)
            for name in ("inputs", "segment_ids", "positions")
        }
        for half, sequence in enumerate(sequences):
            kept = sequence[-self.length :]
            place = slice(half * self.length, half * self.length + len(kept))
            arrays["inputs"][place], arrays["positions"][place] = kept, np.arange(len(kept))
            arrays["segment_ids"][place] = half + 1
        return arrays

    def predict(self, model: BoundModel, batch: Batch) -> jax.Array:
        """Return float32 rewards [B, P]."""
        segments_BL = batch["segment_ids"]
        x_BLD = model.hidden(batch["inputs"], batch["positions"], segments_BL)
        x_BPLD, segments_BPL = in_halves(x_BLD), in_halves(segments_BL)
        rewards = (
            model.classify(model.pooled(x_BPLD[:, half], segments_BPL[:, half]))
            for half in range(HALVES)
        )
        return jnp.concatenate([*rewards], axis=-1)

    def loss(self, model: BoundModel, batch: Batch) -> LossSums:
        """Return the loss of each pair, with accuracy and reward margin."""
        weights_B, rewards_BP = batch["weights"], self.predict(model, batch)
        margin_B = rewards_BP[:, 0] - rewards_BP[:, 1]
        loss_B = softplus(batch["margin"] - margin_B)
        if self.centering:
            loss_B += self.centering * jnp.square(rewards_BP.sum(-1))
        figures = pair_metrics(rewards_BP)
        return LossSums(
            (loss_B * weights_B).sum(),
            weights_B.sum(),
            {name: (value_B * weights_B).sum() for name, value_B in figures.items()},
        )
