"""Loss, perplexity and accuracy of a model over a whole split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import jax
import numpy as np

from lm.data.batches import Batches, prefetch
from lm.experiment import Experiment
from lm.steps import Params


def evaluate(
    experiment: Experiment,
    params: Params,
    batches: Batches,
    n_bytes: int | None,
    max_batches: int = 0,
    track: Callable[..., Iterable] = lambda batches, total: batches,
) -> dict[str, float]:
    """Loss (nats a target), perplexity, accuracy and number of targets over all batches.

    With `max_batches` over the first so many; `track(iterator, total=n)` may show progress.
    Over the whole split and given its size in UTF-8 bytes, also bits a byte: all nats /
    (ln 2 · bytes), document ends included.
    """
    n = min(len(batches), max_batches or len(batches))
    together = experiment.config.train.steps_per_dispatch
    dispatches = [range(i, min(i + together, n)) for i in range(0, n, together)]
    totals: dict[str, float] = {}
    arrays = prefetch(batches, dispatches, experiment.batch_sharding)
    for batch in track(arrays, total=len(dispatches)):
        sums = jax.device_get(experiment.eval_steps(params, batch))
        for name, values in {"loss": sums.loss, "targets": sums.weight, **sums.metrics}.items():
            totals[name] = totals.get(name, 0.0) + float(values.sum(dtype=np.float64))
    targets = totals.pop("targets")
    result = {name: total / max(targets, 1.0) for name, total in totals.items()}
    result["perplexity"] = math.exp(min(result["loss"], 700.0))
    result["targets"] = targets
    if n == len(batches) and n_bytes:
        result["bits_per_byte"] = totals["loss"] / (math.log(2) * n_bytes)
    return result
