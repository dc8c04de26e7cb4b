"""Loss, perplexity and accuracy over a whole split."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from typing import Any

import jax
import numpy as np

from lm.data.batches import Batches, prefetch
from lm.data.dataset import Store
from lm.data.store import TokenStore
from lm.data.tokenizer import Tokenizer
from lm.data.unspaced_scripts import UNSPACED
from lm.experiment import Experiment
from lm.models.variables import Params

_PLACES, _TOKENS = 8, 2000  # sampled positions, and tokens at each, per store
_OF_CODE = re.compile(r"[_(){}\[\]<>=;\\*#@$%^&|~+/]")


def evaluate_loss(
    experiment: Experiment,
    params: Params,
    batches: Batches,
    stores: Sequence[Store],
    max_batches: int = 0,
    track: Callable[..., Iterable] = lambda batches, total: batches,
) -> dict[str, float]:
    """Return the mean loss and metrics over batches, without dropout.

    Args:
        experiment: experiment on a mesh.
        params: parameters.
        batches: batches to evaluate, from `stores`.
        stores: stores of the split.
        max_batches: number of batches to evaluate; 0: all.
        track: wraps the batches, given `total`, to show progress.

    Returns:
        "targets", and if there are any "loss" in nats per target, the metrics of the objective, and
        "perplexity" if the objective has one. If every token of whole documents is a target, also
        "word_perplexity" (if spaces separate words: not for Chinese or code) and "bits_per_byte",
        nats / (ln 2 · bytes), including document ends.
    """
    n = min(len(batches), max_batches or len(batches))
    size = experiment.config.train.steps_per_dispatch
    dispatches = [range(i, min(i + size, n)) for i in range(0, n, size)]
    totals: dict[str, Any] = {}
    carry = experiment.init_carry(batches.batch_size)
    arrays = prefetch(batches, dispatches, experiment.batch_sharding)
    with closing(arrays):
        for batch in track(arrays, total=len(dispatches)):
            carry, sums = experiment.eval_steps(params, carry, batch)
            found = {"loss": sums.loss, "targets": sums.weight, **sums.metrics}
            found = jax.tree.map(lambda x: x.sum(dtype=np.float64), jax.device_get(found))
            totals = jax.tree.map(np.add, totals, found) if totals else found
    targets = float(totals.pop("targets"))
    if not targets:
        return {"targets": 0.0}
    result = {name: float(total / targets) for name, total in totals.items()}
    result["targets"] = targets
    nats = result.pop("nll", result["loss"]) * targets
    if experiment.objective.has_perplexity:
        result["perplexity"] = perplexity(nats, targets)
    texts = [store for store in stores if isinstance(store, TokenStore)]
    manifests = [store.manifest for store in texts]
    has_text = texts and all(m.n_bytes for m in manifests)  # unknown for pretokenized files
    if n == len(batches) and has_text and experiment.objective.predicts_every_token:
        if experiment.tokenizer is not None and stores_have_words(texts, experiment.tokenizer):
            result["word_perplexity"] = perplexity(nats, sum(m.n_words for m in manifests))
        result["bits_per_byte"] = nats / (math.log(2) * sum(m.n_bytes for m in manifests))
    return result


def losses_by_source(
    experiment: Experiment,
    params: Params,
    stores: Sequence[Store],
    max_batches: int = 0,
    track: Callable[..., Iterable] = lambda batches, total: batches,
) -> dict[str, float]:
    """Return the loss of each store as "SOURCE/loss", with `--config.eval.by_source`.

    Empty for a split with a single store, which is already evaluated.

    Args:
        experiment: experiment on a mesh.
        params: parameters.
        stores: stores of the split.
        max_batches: number of batches per store; 0: all.
        track: see `evaluate_loss`.
    """
    found: dict[str, float] = {}
    for store in stores if experiment.config.eval.by_source and len(stores) > 1 else ():
        batches = experiment.evaluation_batches([store])
        result = evaluate_loss(experiment, params, batches, [store], max_batches, track)
        found[f"{store.manifest.source}/loss"] = result.get("loss", math.nan)
    return found


def perplexity(nats: float, n: float) -> float:
    """Return exp(nats / n), clipped to a finite value."""
    return math.exp(min(nats / max(n, 1.0), 700.0))


def figure_text(name: str, value: float) -> str:
    """Format a metric for display: perplexities with five significant digits."""
    return f"{value:.5g}" if name.endswith("perplexity") else f"{value:.6g}"


def has_spaced_words(text: str) -> bool:
    """Return whether a text consists of space-separated words: not unspaced scripts, not code."""
    n_letters = sum(character.isalpha() for character in text)
    n_visible = sum(not character.isspace() for character in text)
    return (
        10 * len(UNSPACED.findall(text)) < max(n_letters, 1)
        and 15 * len(_OF_CODE.findall(text)) < n_visible
    )


def stores_have_words(stores: Sequence[TokenStore], tokenizer: Tokenizer) -> bool:
    """Apply `has_spaced_words` to a sample of the stores' text."""
    texts = []
    for store in stores:
        last = max(store.n_tokens - _TOKENS, 0)
        starts = sorted({round(last * i / (_PLACES - 1)) for i in range(_PLACES)})
        parts = (store.tokens[start : start + _TOKENS] for start in starts)
        texts += [tokenizer.decode(part.tolist()) for part in parts]
    return has_spaced_words("".join(texts))
