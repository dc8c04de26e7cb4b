"""`lm inspect`: a self-contained page that analyzes texts with a model, and its data files.

Shape letters: N layers, H heads, U sublayers, L query length, S key length, Q predictions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lm.data.batches import Batches
from lm.data.records import read_jsonl_rows
from lm.data.tokenizer import Tokenizer
from lm.decoding.prompts import is_encoder_decoder
from lm.errors import UserError
from lm.experiment import Experiment
from lm.insight.capture import require_transformer
from lm.insight.neurons import Neuron, top_neurons
from lm.insight.reading import Passage, Predictions, Reading, make_passage, read, token_texts
from lm.models.variables import Params
from lm.progress import track
from lm.tools.formatting import short
from lm.tools.html_pages import page_template
from lm.tools.reports.plotting import COLORS, count_axis, gray_png, legend, subplots, svg

TEMPLATE = Path(__file__).with_name("inspect_page.html")
TextOf = Callable[[int], str]
MOST_TEXTS = 32

# Titles of the maps of `Reading.arrays`, and the sequences of their queries and keys.
_MAPS = {
    "attention": ("Self-attention", "tokens", "tokens"),
    "encoder/attention": ("Encoder self-attention", "source", "source"),
    "decoder/cross_attention": ("Cross-attention", "tokens", "source"),
    "decoder/attention": ("Decoder self-attention", "tokens", "tokens"),
}


@dataclass(frozen=True)
class Text:
    """Text to inspect: a prompt, or a source with an optional target."""

    text: str
    target: str | None = None


def read_texts(file: Path) -> list[Text]:
    """Read texts from JSON objects with "prompt", "source" or "text", and "target".

    Raises:
        UserError: the file cannot be read, or a line has no text.
    """
    if not file.is_file():
        raise UserError(f"no file {file}")
    found = []
    for row in read_jsonl_rows(file):
        values = row.values
        texts = [values[name] for name in ("prompt", "source", "text") if name in values]
        text, target = texts[0] if texts else None, values.get("target")
        problem = row.problem
        if not problem and not isinstance(text, str):
            problem = "no text in a field 'prompt', 'source' or 'text'"
        if not problem and not isinstance(target, str | None):
            problem = "'target' must be a string"
        if problem:
            raise UserError(f"{row.where}: {problem}")
        assert isinstance(text, str)
        found.append(Text(text, target))
    if not found:
        raise UserError(f"{file} has no texts")
    return found


def write_inspect_page(
    experiment: Experiment,
    params: Params,
    step: int,
    texts: Sequence[Text],
    output: Path,
    title: str,
    corpus: Batches | None = None,
) -> Path:
    """Write index.html, text-1.npz, text-2.npz, … and neurons.json; return the page's path.

    Args:
        experiment: experiment on a mesh, with its tokenizer.
        params: parameters.
        step: number of updates.
        texts: texts to analyze.
        output: output folder.
        title: title of the page.
        corpus: batches to search for the most active neurons.

    Raises:
        UserError: the model cannot read a text, or the extra "report" is not installed.
    """
    template, tokenizer = page_template(TEMPLATE), experiment.tokenizer
    assert tokenizer is not None
    require_transformer(experiment.model)
    if len(texts) > MOST_TEXTS:
        raise UserError(f"{len(texts)} texts: a page shows at most {MOST_TEXTS}")
    passages = []
    for number, text in enumerate(texts, 1):
        try:
            passage = make_passage(experiment, params, tokenizer, text.text, text.target)
        except UserError as error:
            raise UserError(f"text {number}: {error}") from error
        passages.append(passage)
    readings: list[tuple[Reading, TextOf]] = []
    for passage in track(passages, len(passages), description="reading"):
        ids = [*passage.tokens, *(() if passage.source is None else passage.source)]
        text_of = token_texts(tokenizer, list(map(int, ids)))
        readings.append((read(experiment, params, passage), text_of))
    neurons = []
    if corpus is not None:
        most = experiment.config.eval.max_batches
        found = top_neurons(experiment, params, corpus, most)
        neurons = [_shown_neuron(neuron, tokenizer) for neuron in found]
    page = template.render(
        title=title,
        lead=_lead(experiment, step),
        tiles=_tiles(experiment, [reading for reading, _ in readings]),
        names=[text.text[:40] for text in texts],
        texts=[_shown(reading, text_of) for reading, text_of in readings],
        norms=[list(map(svg, _norms(reading))) for reading, _ in readings],
        neurons=neurons,
    )
    output.mkdir(parents=True, exist_ok=True)
    for number, (reading, text_of) in enumerate(readings, 1):
        arrays: dict[str, Any] = _arrays(reading, text_of)
        np.savez_compressed(output / f"text-{number}.npz", **arrays)
    if corpus is not None:
        listed = json.dumps(neurons, indent=1, ensure_ascii=False)
        (output / "neurons.json").write_bytes(listed.encode(errors="replace"))
    file = output / "index.html"
    file.write_bytes(page.encode(errors="replace"))
    return file


def _lead(experiment: Experiment, step: int) -> str:
    config = experiment.config
    family = config.model.family.replace("_", "–")
    after = f", after {step:,} steps" if step else ""
    return f"What the {family} ({config.objective.name}) makes of a text{after}."


def _tiles(experiment: Experiment, readings: Sequence[Reading]) -> dict[str, str]:
    """Return the headline figures by caption."""
    config: Any = experiment.model.config  # type: ignore[attr-defined]
    n_layers = str(config.n_layers)
    if is_encoder_decoder(experiment.model):
        n_layers += f" + {config.n_decoder_layers or config.n_layers}"
    tiles = {
        "layers × heads": f"{n_layers} × {config.n_heads}",
        "width": f"{config.d_model:,}",
        "parameters": short(sum(x.size for x in jax.tree.leaves(experiment.param_shapes))),
    }
    found = [(r.predictions.scores, r.passage.targets >= 0) for r in readings if r.predictions]
    losses = [scores.loss[known] for scores, known in found]
    if n := sum(map(len, losses)):
        loss = float(np.concatenate(losses).mean())
        ranks = np.concatenate([scores.rank[known] for scores, known in found])
        tiles |= {"scored tokens": f"{n:,}", "loss, nats per token": f"{loss:.3f}"}
        name = "pseudo-perplexity" if readings[0].passage.mask >= 0 else "perplexity"
        tiles |= {name: f"{np.exp(loss):.4g}", "likeliest": f"{(ranks == 1).mean():.0%}"}
    return tiles


def _arrays(reading: Reading, text_of: TextOf) -> dict[str, np.ndarray]:
    """Return the data of a reading, as arrays that numpy.load reads without pickles."""
    passage, found = reading.passage, reading.predictions
    arrays = dict(reading.arrays)
    arrays["token_ids"] = passage.tokens
    arrays["tokens"] = np.array([text_of(int(i)) for i in passage.tokens])
    if passage.source is not None:
        arrays["source_ids"] = passage.source
        arrays["source_tokens"] = np.array([text_of(int(i)) for i in passage.source])
    if found is not None:
        arrays |= {"positions": passage.positions, "targets": passage.targets}
        arrays["attribution"] = found.attribution
        if passage.classes:
            arrays["classes"] = np.array(passage.classes)
        if found.source_attribution is not None:
            arrays["source_attribution"] = found.source_attribution
        for prefix, scores in (("", found.scores), ("lens_", found.lens)):
            arrays |= {f"{prefix}{name}": value for name, value in vars(scores).items()}
    return arrays


def _shown(reading: Reading, text_of: TextOf) -> dict[str, Any]:
    """Return what the page's script draws of a reading, as JSON values."""
    passage = reading.passage
    shown: dict[str, Any] = {
        "tokens": [text_of(int(i)) for i in passage.tokens],
        "source": None if passage.source is None else [text_of(int(i)) for i in passage.source],
        "predictions": [],
        "maps": [
            {"name": name, "queries": queries, "keys": keys, **_picture(reading.arrays[path])}
            for path, (name, queries, keys) in _MAPS.items()
            if path in reading.arrays
        ],
    }
    if reading.predictions is not None:
        shown["predictions"] = _predictions(passage, reading.predictions, text_of)
    return shown


def _picture(weights_NHLS: np.ndarray) -> dict[str, Any]:
    """Return maps as one picture, a row of tiles per layer, of square roots of the weights."""
    N, H, L, S = weights_NHLS.shape
    tiles = weights_NHLS.transpose(0, 2, 1, 3).reshape(N * L, H * S)
    picture = np.round(255 * np.sqrt(tiles.clip(0, 1))).astype(np.uint8)
    return {"layers": N, "heads": H, "picture": gray_png(picture)}


def _predictions(passage: Passage, found: Predictions, text_of: TextOf) -> list[dict[str, Any]]:
    """Return the predictions as JSON values; "token" is an index into the text, -1 for a class."""
    ahead = 0 if passage.mask >= 0 else 1
    if passage.classes:
        text_of = passage.classes.__getitem__
    rows = []
    for q, (position, target) in enumerate(zip(passage.positions, passage.targets, strict=True)):
        scores, lens = (jax.tree.map(lambda x, q=q: x[q], x) for x in (found.scores, found.lens))
        of_source = found.source_attribution
        rows.append(
            {
                "position": int(position),
                "token": -1 if passage.classes else int(position) + ahead,
                "target": text_of(int(scores.ids[0] if target < 0 else target)),
                "known": bool(target >= 0),
                "loss": _rounded(scores.loss),
                "rank": int(scores.rank),
                "entropy": _rounded(scores.entropy),
                "top": _alternatives(scores.ids, scores.probabilities, text_of),
                "lens": [
                    {
                        "top": _alternatives(ids, probabilities, text_of),
                        "probability": _rounded(np.exp(-loss)),
                        "rank": int(rank),
                    }
                    for ids, probabilities, loss, rank in zip(
                        lens.ids, lens.probabilities, lens.loss, lens.rank, strict=True
                    )
                ],
                "attribution": _rounded_all(found.attribution[q]),
                "source_attribution": None if of_source is None else _rounded_all(of_source[q]),
            }
        )
    return rows


def _alternatives(ids: Any, probabilities: Any, text_of: TextOf) -> list[list[Any]]:
    return [[text_of(int(i)), _rounded(p)] for i, p in zip(ids, probabilities, strict=True)]


def _rounded(value: Any) -> float:
    return float(f"{float(value):.4g}")


def _rounded_all(values: np.ndarray) -> list[float]:
    return [_rounded(value) for value in values]


def _shown_neuron(neuron: Neuron, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a neuron for the page, with an opacity for each token."""
    stack = f"{neuron.stack} " if neuron.stack else ""
    contexts = []
    for context in neuron.contexts:
        text_of = token_texts(tokenizer, context.ids.tolist())
        shades = np.clip(context.activations / neuron.peak, 0, 1).round(3)
        texts = [text_of(int(i)).replace("\n", "⏎") for i in context.ids]
        contexts.append(list(zip(texts, shades.tolist(), strict=True)))
    return {
        "name": f"{stack}layer {neuron.layer + 1}, neuron {neuron.index}".capitalize(),
        "about": f"peak {neuron.peak:.3g}, fires at {neuron.share:.1%} of the tokens",
        "contexts": contexts,
    }


def _norms(reading: Reading) -> list[Any]:
    """Plot the norms of each stack's residual stream and sublayer updates by layer."""
    figures = []
    for path in sorted(reading.arrays, reverse=True):  # encoder before decoder
        if not path.endswith("residual"):
            continue
        stack = path.removesuffix("residual")
        residual, updates = reading.arrays[path], reading.arrays[f"{stack}updates"]
        colors = {"attention": COLORS[1], "feed-forward": COLORS[2], "cross-attention": COLORS[3]}
        has_source = updates.shape[1] == len(colors)
        names = sorted(colors) if has_source else ["attention", "feed-forward"]
        figure, axes = subplots()
        _band(axes, np.arange(len(residual)), residual, COLORS[0], "residual stream")
        for i, name in enumerate(names):
            x = np.arange(1, len(updates) + 1)
            _band(axes, x, updates[:, i], colors[name], f"{name} update")
        axes.set(xlabel=f"{stack.rstrip('/')} layer".strip(), ylabel="norm")
        axes.xaxis.get_major_locator().set_params(integer=True)
        legend(axes, 1 + len(names))
        low, high = np.quantile(np.concatenate([residual.ravel(), updates.ravel()]), (0.1, 0.9))
        if low > 0 and high / low >= 5:
            count_axis(axes.yaxis)
        figures.append(figure)
    return figures


def _band(axes: Any, x: np.ndarray, values: np.ndarray, color: str, label: str) -> None:
    """Plot the median over tokens [layers, tokens], and the range of the middle 80 %."""
    low, middle, high = np.quantile(values, (0.1, 0.5, 0.9), axis=1)
    axes.plot(x, middle, "o-", markersize=4, color=color, label=label)
    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
