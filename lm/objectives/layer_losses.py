"""Auxiliary losses and metrics sown by layers (such as MoE), added to an objective's loss.

Shape letters: N layers, B batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lm.models.variables import LOSSES, METRICS
from lm.objectives.objective import Batch, LossSums


def add_sown(sums: LossSums, sown: Mapping[str, Any], batch: Batch) -> LossSums:
    """Add losses and metrics sown by layers to the loss sums of an objective.

    Each row's values are weighted by the row's target weights. They are thus sums over the batch
    like the objective's own, with the same divisor, and do not depend on how rows are split over
    devices or microbatches. The metric "nll" is the loss without them.

    Args:
        sums: loss sums of the objective.
        sown: Flax collections `LOSSES` and `METRICS`, with leaves [B] or [N, B].
        batch: features of the same batch.
    """
    weights_B = _row_weights(batch)

    def total(value_NB: jax.Array) -> jax.Array:
        return (value_NB.reshape(-1, len(weights_B)) * weights_B).sum()

    loss = sum(map(total, jax.tree.leaves(sown.get(LOSSES, {}))), sums.loss)
    layers: dict[str, list[jax.Array]] = {}
    for path, value_NB in jax.tree.leaves_with_path(sown.get(METRICS, {})):
        name = path[-2].key  # the last part is the index among the sown values
        layers.setdefault(name, []).append(value_NB.reshape(-1, len(weights_B)))
    means = {
        name: total(jnp.concatenate(values)) / sum(map(len, values))
        for name, values in layers.items()
    }
    return LossSums(loss, sums.weight, {"nll": sums.loss} | sums.metrics | means)


def _row_weights(batch: Batch) -> jax.Array:
    """Return the sum [B] of target weights per row."""
    weights = batch["weights"]
    return weights.reshape(len(weights), -1).sum(1)
