"""Feed-forward neurons with the largest activations over a corpus, and their top texts.

A neuron is a hidden unit of a dense feed-forward layer, after the activation and (if gated) the
product with its gate. It fires if it is above 0.

Shape letters: B batch, L length, F feed-forward, N layers, K contexts, P picked neurons.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.data.batches import Batches
from lm.errors import UserError
from lm.experiment import Experiment
from lm.insight.capture import has_all_params, require_transformer, run_and_capture
from lm.models.variables import Params, as_variables
from lm.progress import track

N_NEURONS, N_CONTEXTS = 12, 3
_BEFORE, _AFTER = 24, 8  # tokens shown before and after the peak


@dataclass(frozen=True)
class Context:
    """Tokens around a neuron's peak: their ids and activations."""

    ids: np.ndarray
    activations: np.ndarray


@dataclass(frozen=True)
class Neuron:
    """Strongly firing neuron.

    Attributes:
        stack: "encoder" or "decoder" of an encoder–decoder, else "".
        layer: layer index, from 0.
        index: index in the layer.
        peak: largest activation.
        share: fraction of tokens at which it fires.
        contexts: contexts of the largest activations, in different rows, strongest first.
    """

    stack: str
    layer: int
    index: int
    peak: float
    share: float
    contexts: tuple[Context, ...]


@dataclass
class _Tally:
    """Accumulated statistics of one stack.

    Attributes:
        fires: number of tokens at which each neuron fires [N, F].
        peaks: largest activations of each neuron in different rows [N, F, K].
        places: batch, row and column of each [N, F, K, 3].
    """

    fires: np.ndarray
    peaks: np.ndarray
    places: np.ndarray

    @classmethod
    def empty(cls, n_layers: int, width: int) -> _Tally:
        shape = n_layers, width, N_CONTEXTS
        return cls(np.zeros(shape[:2], int), np.full(shape, -np.inf), np.zeros((*shape, 3), int))

    def add(self, batch: int, fires: np.ndarray, peaks: np.ndarray, columns: np.ndarray) -> None:
        """Add a batch: `fires` [N, F], and per-row `peaks` with their `columns` [N, F, B]."""
        self.fires += fires
        rows = np.broadcast_to(np.arange(peaks.shape[-1]), peaks.shape)
        places = np.stack([np.full(peaks.shape, batch), rows, columns], axis=-1)
        peaks = np.concatenate([self.peaks, peaks], axis=-1)
        places = np.concatenate([self.places, places], axis=-2)
        best = np.argsort(-peaks, axis=-1, kind="stable")[..., :N_CONTEXTS]
        self.peaks = np.take_along_axis(peaks, best, axis=-1)
        self.places = np.take_along_axis(places, best[..., None], axis=-2)


def top_neurons(
    experiment: Experiment, params: Params, batches: Batches, max_batches: int = 0
) -> list[Neuron]:
    """Return the neurons with the largest activations, equally many per layer.

    Args:
        experiment: experiment on a mesh; the model reads its objective's features.
        params: parameters.
        batches: batches of the corpus.
        max_batches: number of batches to read; 0: all.

    Raises:
        UserError: the model is not a Transformer, or has no dense feed-forward layer.
    """
    require_transformer(experiment.model)
    variables, n = as_variables(params), len(batches)
    n = min(n, max_batches) if max_batches else n
    summarize = jax.jit(partial(_summarize, experiment))
    tallies: dict[str, _Tally] = {}
    tokens: dict[str, int] = {}
    for number in track(range(n), n, description="neurons"):
        batch = batches.rows(number, range(batches.batch_size))
        for stack, (count, *found) in jax.device_get(summarize(variables, batch)).items():
            fires, peaks, columns = map(np.asarray, found)
            tally = tallies.setdefault(stack, _Tally.empty(*fires.shape))
            tally.add(number, fires, peaks, columns)
            tokens[stack] = tokens.get(stack, 0) + int(count)
    if not tallies:
        raise UserError("the model has no dense feed-forward layers, so it has no neurons")
    return [
        neuron
        for stack, tally in tallies.items()
        for neuron in _pick(experiment, variables, batches, stack, tally, tokens[stack])
    ]


def _capture(experiment: Experiment, variables: Any, batch: Any) -> dict[str, jax.Array]:
    """Return the activations [N, B, L, F] of each stack during the objective's loss.

    A model imported without output layers has no loss; it only reads the inputs.
    """

    def run(model: Any) -> Any:
        if has_all_params(experiment, variables["params"]):
            return experiment.objective.loss(model, batch).loss
        return model.hidden(batch["inputs"], None, batch["segment_ids"])

    _, captured = run_and_capture(experiment.model, variables, ("neurons",), run)
    return {path.rpartition("/")[0]: x for path, x in captured.items()}


def _read_by(stack: str, batch: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the tokens and segment ids [B, L] of a batch for a stack."""
    if stack == "encoder" and "source" in batch:
        return batch["source"], batch["source_segments"]
    names = ("segment_ids", "target_segments")
    segments = next((batch[name] for name in names if name in batch), None)
    tokens = batch["inputs"]
    return tokens, np.ones_like(tokens) if segments is None else segments


def _summarize(experiment: Experiment, variables: Any, batch: Any) -> dict[str, tuple[Any, ...]]:
    """Return the number of tokens of each stack, and the arguments of `_Tally.add`."""
    summaries = {}
    for stack, x_NBLF in _capture(experiment, variables, batch).items():
        is_token_BL = _read_by(stack, batch)[1] != 0
        x_NBLF = jnp.where(is_token_BL[..., None], x_NBLF, -jnp.inf)
        peaks_NBF, columns_NBF = x_NBLF.max(2), x_NBLF.argmax(2)
        fires_NF = (x_NBLF > 0).sum((1, 2))
        found = (fires_NF, peaks_NBF.swapaxes(1, 2), columns_NBF.swapaxes(1, 2))
        summaries[stack] = (is_token_BL.sum(), *found)
    return summaries


def _pick(
    experiment: Experiment,
    variables: Any,
    batches: Batches,
    stack: str,
    tally: _Tally,
    n_tokens: int,
) -> Iterable[Neuron]:
    """Yield the neurons of a stack with the highest peaks, with their contexts."""
    n_layers = len(tally.fires)
    each = max(1, N_NEURONS // n_layers)
    layers_P = np.repeat(np.arange(n_layers), each)
    indices_P = np.argsort(-tally.peaks[..., 0], axis=-1)[:, :each].reshape(-1)

    @jax.jit
    def activations(variables: Any, batch: Any) -> jax.Array:
        x_NBLF = _capture(experiment, variables, batch)[stack]
        return x_NBLF.transpose(0, 3, 1, 2)[layers_P, indices_P]

    kept: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    for number in sorted(set(tally.places[layers_P, indices_P, :, 0].reshape(-1).tolist())):
        batch = batches.rows(number, range(batches.batch_size))
        tokens, segments = map(np.asarray, _read_by(stack, batch))
        kept[number] = tokens, segments, np.asarray(activations(variables, batch))
    numbers = _dense_layers(experiment, stack)
    for pick, (layer, index) in enumerate(zip(layers_P, indices_P, strict=True)):
        contexts = []
        peaks = tally.peaks[layer, index]
        for place, peak in zip(tally.places[layer, index].tolist(), peaks, strict=True):
            if peak <= 0:  # fewer rows than contexts, or the neuron never fires
                continue
            (number, row, column), (tokens, segments, x_PBL) = place, kept[place[0]]
            same = np.flatnonzero(segments[row] == segments[row, column])
            first = max(same[0], column - _BEFORE)
            here = slice(first, min(same[-1], column + _AFTER) + 1)
            contexts.append(Context(tokens[row, here], x_PBL[pick, row, here]))
        share = float(tally.fires[layer, index]) / max(1, n_tokens)
        yield Neuron(stack, numbers[layer], int(index), float(peaks[0]), share, tuple(contexts))


def _dense_layers(experiment: Experiment, stack: str) -> list[int]:
    """Return the indices of a stack's layers without experts."""
    config: Any = experiment.model.config  # type: ignore[attr-defined]
    own = config.n_decoder_layers if stack == "decoder" else 0
    types = config.layer_types(own or config.n_layers)
    return [i for i, layer_type in enumerate(types) if layer_type.feed_forward == "dense"]
