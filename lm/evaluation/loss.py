"""Loss, perplexity and accuracy of a model over a whole split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np

from lm.data.batches import Batches, prefetch
from lm.data.dataset import Store
from lm.data.store import TokenStore
from lm.experiment import Experiment
from lm.train_step import Params

# What these predict are no tokens.
NO_PERPLEXITY = ("classification", "span_qa", "skip_gram")


def evaluate(
    experiment: Experiment,
    params: Params,
    batches: Batches,
    stores: Sequence[Store],
    max_batches: int = 0,
    track: Callable[..., Iterable] = lambda batches, total: batches,
) -> dict[str, float]:
    """Loss (nats a target), perplexity, accuracy and number of targets over all batches.

    With `max_batches` over the first so many; `track(iterator, total=n)` may show progress.
    `stores` are what the batches were made of: over a whole split of documents also the
    perplexity of a word (of those between spaces) and bits a byte, all nats / (ln 2 · bytes),
    document ends included.
    """
    n = min(len(batches), max_batches or len(batches))
    together = experiment.config.train.steps_per_dispatch
    dispatches = [range(i, min(i + together, n)) for i in range(0, n, together)]
    totals: dict[str, float] = {}
    carry = experiment.init_carry(batches.batch_size)
    arrays = prefetch(batches, dispatches, experiment.batch_sharding)
    for batch in track(arrays, total=len(dispatches)):
        carry, sums = experiment.eval_steps(params, carry, batch)
        sums = jax.device_get(sums)
        for name, values in {"loss": sums.loss, "targets": sums.weight, **sums.metrics}.items():
            totals[name] = totals.get(name, 0.0) + float(values.sum(dtype=np.float64))
    targets = totals.pop("targets")
    result = {name: total / max(targets, 1.0) for name, total in totals.items()}
    result["targets"] = targets
    nats = result.pop("nll", result["loss"]) * targets
    if experiment.config.objective.name not in NO_PERPLEXITY:
        result["perplexity"] = perplexity(nats, targets)
    manifests = [store.manifest for store in stores if isinstance(store, TokenStore)]
    if n == len(batches) and manifests and experiment.config.objective.name == "causal":
        result["word_perplexity"] = perplexity(nats, sum(m.n_words for m in manifests))
        result["bits_per_byte"] = nats / (math.log(2) * sum(m.n_bytes for m in manifests))
    return result


def perplexity(nats: float, n: float) -> float:
    """exp(nats / n)."""
    return math.exp(min(nats / max(n, 1.0), 700.0))
