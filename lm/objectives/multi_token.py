"""Multi-token prediction: the next token and further ones (DeepSeek-AI 2024b, §2.2).

Shape letters: B batch, L length, D model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from lm.data.tokenizer import Tokenizer
from lm.models.ahead_modules import hidden_ahead
from lm.objectives.causal import Causal
from lm.objectives.losses import token_loss
from lm.objectives.objective import Batch, LossSums


@dataclass(frozen=True)
class MultiToken(Causal):
    """Next-token prediction with `depth` additional modules, each predicting one token further.

    Attributes:
        depth: number of modules.
        weight: weight of the modules' mean loss (λ in the report).
    """

    families: ClassVar[Any] = ("decoder",)

    depth: int = 1
    weight: float = 0.3

    @classmethod
    def from_config(cls, config: ConfigDict, tokenizer: Tokenizer | None) -> MultiToken:
        found = super().from_config(config, tokenizer)
        assert isinstance(found, MultiToken)
        o = config.objective
        return replace(found, depth=o.mtp_depth, weight=o.mtp_weight)

    def loss(self, model: Any, batch: Batch) -> LossSums:
        """Return the cross-entropy of every next token and of the modules (equations 24 and 25).

        A module has no targets beyond the end of a document: each target needs all tokens before
        it in its document.
        """
        text = batch.get("positions"), batch.get("segment_ids")
        targets, settings = batch["targets"], (self.label_smoothing, self.z_loss)
        x_BLD = model.hidden(batch["inputs"], *text)
        sums = token_loss(model, x_BLD, targets, batch["weights"], *settings)
        tokens = [_ahead(targets, k) for k in range(self.depth + 1)]
        weights_BL, further = batch["weights"], []
        hidden = hidden_ahead(model, x_BLD, tokens[: self.depth], *text)
        for k, x_BLD in enumerate(hidden, start=1):
            weights_BL = weights_BL * _ahead(batch["weights"], k)
            further.append(token_loss(model, x_BLD, tokens[k], weights_BL, *settings))
        mean = sum((found.loss for found in further), jnp.zeros(())) / self.depth
        metrics = {f"nll_{k}": found.metrics["nll"] for k, found in enumerate(further, start=2)}
        return LossSums(sums.loss + self.weight * mean, sums.weight, sums.metrics | metrics)


def _ahead(x_BL: jax.Array, k: int) -> jax.Array:
    """Shift left by k positions and fill with zeros."""
    return jnp.pad(x_BL, ((0, 0), (0, k)))[:, k:]
