"""Linear probes of every layer's states (Alain and Bengio 2016), with a control task.

A probe with high accuracy may have learned the labels by itself. The control task (Hewitt and Liang
2019) assigns a random label with the same frequencies to every word type; the accuracy above it,
the selectivity, comes from the states.

Shape letters: B batch, L length, M spans per row, D model, N layers.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lm.data.dataset import open_sources
from lm.data.record_store import Record, build_record_store
from lm.data.records import Records, split_words
from lm.data.row_documents import MISSING, field_value
from lm.data.special_tokens import special_tokens
from lm.data.tokenizer import Tokenizer
from lm.decoding.prompts import (
    check_ids,
    context_length,
    is_encoder_decoder,
    pad_ids,
    require_text_input,
)
from lm.errors import UserError, missing_package
from lm.experiment import Experiment
from lm.insight.capture import require_transformer, run_and_capture
from lm.models.variables import Params, as_variables
from lm.progress import track
from lm.storage import cache_directory

MOST_TOKENS = 512  # longer texts are truncated
MOST_SPANS = 20_000  # maximum spans for fitting or scoring a probe, evenly spaced
MOST_CLASSES = 200
_HELD_OUT = 5  # without validation records, every fifth one is held out
_BATCH, _MULTIPLE = 16, 32


@dataclass(frozen=True)
class LabeledSpan:
    """Text or word whose mean state is classified.

    Attributes:
        first: index of its first token.
        end: index after its last token.
        label: its class.
        word: word type for the control task: the word, or the last word of a text.
    """

    first: int
    end: int
    label: str
    word: str


@dataclass(frozen=True)
class LabeledRow:
    """Input token ids of a row, with its labeled spans."""

    ids: list[int]
    spans: list[LabeledSpan]


@dataclass(frozen=True)
class LayerScore:
    """Held-out accuracies of a layer's probe, in percent.

    Attributes:
        layer: 0 for the embedding, then 1, 2, ….
        accuracy: accuracy for the labels.
        control: accuracy for the control task.
    """

    layer: int
    accuracy: float
    control: float

    @property
    def selectivity(self) -> float:
        """Accuracy minus that of the control task."""
        return self.accuracy - self.control


@dataclass(frozen=True)
class ProbeReport:
    """Scores of all layers.

    Attributes:
        layers: scores of each layer, embedding first.
        majority: accuracy of the most frequent label, in percent.
        classes: class names.
        n_train: number of spans used for fitting.
        n_held_out: number of spans used for scoring.
    """

    layers: list[LayerScore]
    majority: float
    classes: list[str]
    n_train: int
    n_held_out: int


def probe(
    experiment: Experiment, params: Params, labels: str, held_out: str | None, seed: int = 0
) -> ProbeReport:
    """Fit linear probes to the states of every layer, and score them on held-out records.

    Args:
        experiment: experiment on a mesh, with its tokenizer.
        params: parameters.
        labels: source of records with text and label, or words and tags, as in data.source.
        held_out: source of records for scoring; None: every fifth record of `labels`.
        seed: seed of the control task.

    Raises:
        UserError: the model is not a Transformer, the source has no labels, or scikit-learn is not
            installed.
    """
    linear_model = _scikit_learn("sklearn.linear_model")
    pipeline, scaling = _scikit_learn("sklearn.pipeline"), _scikit_learn("sklearn.preprocessing")
    require_transformer(experiment.model)
    rows = _read_rows(experiment, labels)
    if held_out is None:
        parts = (
            [r for i, r in enumerate(rows) if (i + 1) % _HELD_OUT],
            rows[_HELD_OUT - 1 :: _HELD_OUT],
        )
    else:
        parts = rows, _read_rows(experiment, held_out)
    train, test = (_at_most(part) for part in parts)
    classes = sorted({span.label for row in train for span in row.spans})
    if len(classes) < 2 or not test:
        raise UserError(f"{labels}: a probe needs two classes, and held-out records")
    if len(classes) > MOST_CLASSES:
        raise UserError(
            f"{labels}: {len(classes)} different labels; at most {MOST_CLASSES} are supported"
        )
    if not any(span.label in classes for row in test for span in row.spans):
        raise UserError(f"{held_out}: none of its labels occur in {labels}")
    states = [
        _states(experiment, params, part, name)
        for part, name in ((train, "states"), (test, "held-out states"))
    ]
    spans = [[span for row in part for span in row.spans] for part in (train, test)]
    own = [np.array([span.label for span in part]) for part in spans]
    control = _control_labels(spans, own[0], seed)

    def accuracy(layer: int, targets: Sequence[np.ndarray]) -> float:
        if len(np.unique(targets[0])) < 2:
            return 100 * float((targets[1] == targets[0][0]).mean())
        steps = scaling.StandardScaler(), linear_model.LogisticRegression(max_iter=500)
        fitted = pipeline.make_pipeline(*steps).fit(states[0][layer], targets[0])
        return 100 * float(fitted.score(states[1][layer], targets[1]))

    n_layers = len(states[0])
    scores = [
        LayerScore(layer, accuracy(layer, own), accuracy(layer, control))
        for layer in track(range(n_layers), n_layers, description="probes")
    ]
    names, counts = np.unique(own[0], return_counts=True)
    majority = 100 * float((own[1] == names[counts.argmax()]).mean())
    return ProbeReport(scores, majority, classes, len(own[0]), len(own[1]))


def _scikit_learn(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise missing_package("lm probe", "scikit-learn", "eval") from error


def _control_labels(
    spans: Sequence[Sequence[LabeledSpan]], labels: np.ndarray, seed: int
) -> list[np.ndarray]:
    """Return control labels: random per word type, with the frequencies of `labels`."""
    words = sorted({span.word for part in spans for span in part})
    drawn = np.random.default_rng(seed).choice(labels, len(words))
    of_word = dict(zip(words, drawn, strict=True))
    return [np.array([of_word[span.word] for span in part]) for part in spans]


def _at_most(rows: Sequence[LabeledRow]) -> list[LabeledRow]:
    """Return evenly spaced rows with at most `MOST_SPANS` spans."""
    n = sum(len(row.spans) for row in rows)
    every = -(-n // MOST_SPANS)
    return list(rows[:: every or 1])


# --- records to rows


def _read_rows(experiment: Experiment, source: str) -> list[LabeledRow]:
    data, tokenizer = experiment.config.data, experiment.tokenizer
    assert tokenizer is not None
    (records,) = open_sources([source], data, "train", columns=("text", "label"))
    assert isinstance(records, Records)
    records = replace(records, labels=_find_labels(records))
    store = build_record_store(records, tokenizer, cache_directory(data), progress=True)
    make = partial(_row, experiment, tokenizer)
    return [row for record in store if (row := make(record)).spans]


def _find_labels(records: Records) -> tuple[str, ...]:
    """Return the labels of all rows; UserError if there is no label column."""
    columns, found = dict(records.columns), set()
    for row in records.source.rows():
        label = field_value(row.values, columns.get("label", "label"))
        tags = field_value(row.values, columns.get("tags", "tags"))
        if label is not MISSING and label is not None:
            found.add(str(label).strip())
        elif tags is not MISSING and tags is not None:
            found.update(tags if isinstance(tags, list) else split_words(str(tags)))
    if not found:
        raise UserError(f"{records.name}: no labels; name their column in --config.data.columns")
    return tuple(sorted(found))


def _row(experiment: Experiment, tokenizer: Tokenizer, record: Record) -> LabeledRow:
    """Convert a record to the model's input, truncated to its context."""
    require_text_input(experiment.model, "lm probe")
    raw, special = record.raw, special_tokens(tokenizer)
    column = next((name for name in ("words", "text") if name in record.tokens), "")
    if not column or ("tags" if column == "words" else "label") not in raw:
        raise UserError(
            f"a record has {', '.join(raw)}; a probe needs text and label, or words and tags: "
            "name their columns in --config.data.columns"
        )
    before: tuple[int, ...] = tokenizer.template.before
    after: tuple[int, ...] = ()
    if experiment.config.model.family == "encoder":
        before, after = (special.cls,), (special.sep,)
    elif is_encoder_decoder(experiment.model):
        before, after = special.around_source.before, special.around_source.after
    most = min(MOST_TOKENS, context_length(experiment.model) or MOST_TOKENS)
    tokens = record.tokens[column][: most - len(before) - len(after)].tolist()
    ids, first = [*before, *tokens, *after], len(before)
    check_ids([ids], experiment.model)
    if column == "text":
        words = re.findall(r"\w+", raw["text"]) or [raw["text"]]
        span = LabeledSpan(first, first + len(tokens), raw["label"], words[-1].lower())
        return LabeledRow(ids, [span] if tokens else [])
    assert record.starts is not None
    words, tags = split_words(raw["words"]), split_words(raw["tags"])
    numbers = record.starts[: len(tokens)]
    spans = []
    for number, (word, tag) in enumerate(zip(words, tags, strict=True)):
        places = np.flatnonzero(numbers == number)
        if len(places):
            spans.append(LabeledSpan(first + places[0], first + places[-1] + 1, tag, word.lower()))
    return LabeledRow(ids, spans)


# --- rows to states


def _states(
    experiment: Experiment, params: Params, rows: Sequence[LabeledRow], name: str
) -> list[np.ndarray]:
    """Return the mean states of all spans: for each layer [spans, D]."""
    variables, found = as_variables(params), []
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    parts = [order[i : i + _BATCH] for i in range(0, len(order), _BATCH)]
    of_row: dict[int, list[np.ndarray]] = {}
    for numbers in track(parts, len(parts), description=name):
        of_row |= zip(
            numbers,
            _batch_states(experiment.model, variables, [rows[i] for i in numbers]),
            strict=True,
        )
    for layer in range(len(of_row[0])):
        found.append(np.concatenate([of_row[i][layer] for i in range(len(rows))]))
    return found


def _batch_states(
    model: nn.Module, variables: Any, rows: Sequence[LabeledRow]
) -> Iterator[list[np.ndarray]]:
    """Yield the span states of each row: for each layer [M, D]."""
    filled = [*rows, *[rows[-1]] * (_BATCH - len(rows))]
    most = context_length(model)
    longest = max(len(row.ids) for row in rows)
    width = -(-longest // _MULTIPLE) * _MULTIPLE
    tokens_BL, segments_BL = pad_ids([r.ids for r in filled], min(width, most or width), left=False)
    n_spans = max(len(row.spans) for row in rows)
    weights_BML = np.zeros(
        (_BATCH, -(-n_spans // _MULTIPLE) * _MULTIPLE, tokens_BL.shape[1]), np.float32
    )
    for at, row in enumerate(filled):
        for number, span in enumerate(row.spans):
            weights_BML[at, number, span.first : span.end] = 1 / (span.end - span.first)
    found = jax.device_get(_mean_states(model, variables, tokens_BL, segments_BL, weights_BML))
    for at, row in enumerate(rows):
        yield [layer_BMD[at, : len(row.spans)] for layer_BMD in found]


@partial(jax.jit, static_argnums=0)
def _mean_states(
    model: nn.Module, variables: Any, tokens_BL: Any, segments_BL: Any, weights_BML: Any
) -> list[jax.Array]:
    """Return weighted means [B, M, D] of the residual stream, after embedding and each layer."""

    def run(model: Any) -> Any:
        if hasattr(model, "encode"):
            return model.encode(tokens_BL, segments_BL)
        return model.hidden(tokens_BL, None, segments_BL)

    _, captured = run_and_capture(model, variables, ("residual",), run)
    (residual,) = captured.values()
    return [jnp.einsum("bld,bml->bmd", x_BLD, weights_BML) for x_BLD in residual]
