"""What every objective is: examples of a store, features of an example, and a loss.

The trainer divides the global sums that `loss` returns, so neither data parallelism nor
gradient accumulation changes the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

Example = Mapping[str, Any]
Batch = Mapping[str, jax.Array]


class LossSums(NamedTuple):
    """LossSums over a batch: of the loss, of the target weights, and of whatever else is reported.

    A metric "nll" are nats without what the loss adds to them (smoothing, z-loss): where there is
    one, perplexity is made of it.
    """

    loss: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array]


class Objective(Protocol):
    @property
    def shapes(self) -> Mapping[str, tuple[tuple[int, ...], str]]:
        """Shape and type of every feature, without the batch dimension."""
        ...

    @property
    def n_extra_ids(self) -> int:
        """How many token ids the objective uses beyond those of the tokenizer."""
        ...

    def examples(self, store: Any, training: bool) -> Any:
        """What `features` is given one at a time: a sequence, drawn from by random access."""
        ...

    def features(self, example: Example, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Arrays of fixed shape for one example, deterministic in (example, rng)."""
        ...

    def loss(self, model: Any, batch: Batch) -> LossSums:
        """`model` is bound to its parameters: call it and its methods; dropout is set already."""
        ...
