"""Losses and metrics that layers report, joined to an objective's sums.

Shape letters: N layers, B batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lm.models.variables import LOSSES, METRICS
from lm.objectives.objective import Batch, LossSums


def with_reports(sums: LossSums, reported: Mapping[str, Any], batch: Batch) -> LossSums:
    """`sums` with what the layers reported of the same batch.

    A row's figures count as often as its targets do: so they are sums over the batch like the
    objective's own, divided by the same weight, and do not depend on how rows are split over
    devices or microbatches. "nll" stays, or becomes, the loss without them.
    """
    if not reported:
        return sums
    weights_B = row_weights(batch)

    def total(value_NB: jax.Array) -> jax.Array:
        return (value_NB.reshape(-1, len(weights_B)) * weights_B).sum()

    loss = sum(map(total, jax.tree.leaves(reported.get(LOSSES, {}))), sums.loss)
    layers: dict[str, list[jax.Array]] = {}
    for path, value_NB in jax.tree.leaves_with_path(reported.get(METRICS, {})):
        name = path[-2].key  # after it comes its place among the values of that name
        layers.setdefault(name, []).append(value_NB.reshape(-1, len(weights_B)))
    means = {
        name: total(jnp.concatenate(values)) / sum(map(len, values))
        for name, values in layers.items()
    }
    return LossSums(loss, sums.weight, {"nll": sums.loss} | sums.metrics | means)


def row_weights(batch: Batch) -> jax.Array:
    """The weight of each row's targets, [B]: of the feature that is called "weights"."""
    (weights,) = (batch[name] for name in batch if name.endswith(("weights", "weight")))
    return weights.reshape(len(weights), -1).sum(1)
