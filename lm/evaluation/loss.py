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

_PLACES, _TOKENS = 8, 2000  # of a sample from each store
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
        params: its parameters.
        batches: batches to evaluate, made of `stores`.
        stores: stores of the split.
        max_batches: evaluate only the first batches; 0: all.
        track: called with the batches and `total`; returns them, and may show progress.

    Returns:
        "targets", and if there are any "loss" in nats a target, the metrics of the objective, and
        "perplexity" where the objective has one. For every token of whole documents also
        "word_perplexity" (where spaces separate words: not in Chinese, not in code) and
        "bits_per_byte", nats / (ln 2 · bytes), document ends included.
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
    has_text = texts and all(m.n_bytes for m in manifests)  # that of token files is not known
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

    The only store of a split is evaluated with it already.

    Args:
        experiment: experiment on a mesh.
        params: its parameters.
        stores: stores of the split.
        max_batches: evaluate only the first batches of each; 0: all.
        track: as for `evaluate_loss`.
    """
    found: dict[str, float] = {}
    for store in stores if experiment.config.eval.by_source and len(stores) > 1 else ():
        batches = experiment.evaluation_batches([store])
        result = evaluate_loss(experiment, params, batches, [store], max_batches, track)
        found[f"{store.manifest.source}/loss"] = result.get("loss", math.nan)
    return found


def perplexity(nats: float, n: float) -> float:
    """Return exp(nats / n), limited to a finite number."""
    return math.exp(min(nats / max(n, 1.0), 700.0))


def figure_text(name: str, value: float) -> str:
    """Return a figure for people: perplexities with five significant digits."""
    return f"{value:.5g}" if name.endswith("perplexity") else f"{value:.6g}"


def has_spaced_words(text: str) -> bool:
    """Return whether a text is of words between spaces: no script without spaces, no code."""
    n_letters = sum(character.isalpha() for character in text)
    n_visible = sum(not character.isspace() for character in text)
    return (
        10 * len(UNSPACED.findall(text)) < max(n_letters, 1)
        and 15 * len(_OF_CODE.findall(text)) < n_visible
    )


def stores_have_words(stores: Sequence[TokenStore], tokenizer: Tokenizer) -> bool:
    """Return `has_spaced_words` of a sample of the stores' text."""
    texts = []
    for store in stores:
        last = max(store.n_tokens - _TOKENS, 0)
        starts = sorted({round(last * i / (_PLACES - 1)) for i in range(_PLACES)})
        parts = (store.tokens[start : start + _TOKENS] for start in starts)
        texts += [tokenizer.decode(part.tolist()) for part in parts]
    return has_spaced_words("".join(texts))
