"""What every objective is: a way to make features of an example, and a loss.

The trainer divides the global sums that `loss` returns, so neither data parallelism nor
gradient accumulation changes the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

Example = Mapping[str, np.ndarray]
Batch = Mapping[str, jax.Array]
Apply = Callable[..., Any]


class Sums(NamedTuple):
    """Sums over a batch: of the loss, of the target weights, and of whatever else is reported."""

    loss: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array]


class Objective(Protocol):
    def features(self, example: Example, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Arrays of fixed shape for one example, deterministic in (example, rng)."""
        ...

    def loss(self, apply: Apply, batch: Batch) -> Sums:
        """`apply(*inputs)` are the model's logits."""
        ...
