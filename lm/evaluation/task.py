"""`lm eval --task`: what a model makes of every record of a split, and its scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from lm.data.batches import prefetch
from lm.data.records.record_store import Record, RecordStore
from lm.data.tokenizers.tokenizer import Tokenizer
from lm.decoding.batch import transduce
from lm.decoding.generation import text_after
from lm.decoding.options import search_of
from lm.errors import UserError
from lm.evaluation.metrics.scorers import check_metrics, measure
from lm.evaluation.span_answers import span_answers
from lm.experiment import Experiment
from lm.objectives.columns import require_columns
from lm.objectives.registry import make_objective
from lm.train_step import Params


@dataclass(frozen=True)
class Answers:
    """What was predicted for each record, what is right, and the metrics that are usual."""

    predictions: Sequence[Any]
    references: Sequence[Any]
    metrics: tuple[str, ...]


def evaluate_task(
    experiment: Experiment, params: Params, tokenizer: Tokenizer, stores: Sequence[RecordStore]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The scores by config.eval.metrics, and every record with its "prediction".

    A score that is not defined (a correlation with a constant) is None.
    """
    records = list(chain.from_iterable(stores))
    answer = TASKS[experiment.config.objective.name]
    answers = answer(experiment, params, tokenizer, stores, records)
    names = asked_metrics(experiment.config) or answers.metrics
    found = measure(names, answers.predictions, answers.references)
    scores = {name: None if score != score else score for name, score in found.items()}
    rows = [
        {**record.raw, "prediction": prediction}
        for record, prediction in zip(records, answers.predictions, strict=True)
    ]
    return {"n": len(records), **scores}, rows


def check_task(config: ConfigDict) -> None:
    """Raise UserError if the objective is none of records, or a metric is unknown."""
    name = config.objective.name
    if name not in TASKS:
        raise UserError(f"--config.objective.name={name} has no task: lm eval without --task")
    check_metrics(asked_metrics(config))


def asked_metrics(config: ConfigDict) -> tuple[str, ...]:
    """The metrics that config.eval.metrics names, if it names any."""
    return tuple(filter(None, map(str.strip, config.eval.metrics.split(","))))


def write_report(folder: Path, report: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """`report.json` and `predictions.jsonl` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    for name, text in (
        ("report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n"),
        ("predictions.jsonl", "".join(lines)),
    ):
        (folder / name).write_text(text, encoding="utf-8")


def _transduce(
    experiment: Experiment,
    params: Params,
    tokenizer: Tokenizer,
    stores: Sequence[RecordStore],
    records: Sequence[Record],
) -> Answers:
    objective: Any = make_objective(experiment.config, tokenizer)
    for store in stores:
        require_columns(store, "source", "target")
    sources = [objective.source(record) for record in records]
    search = search_of(experiment.config, tokenizer)
    outputs = transduce(experiment, params, tokenizer, sources, search)
    texts = [text_after(tokenizer, [], ids) for ids in outputs]
    return Answers(texts, [record.raw["target"] for record in records], ("bleu", "exact_match"))


def _classify(
    experiment: Experiment,
    params: Params,
    tokenizer: Tokenizer,
    stores: Sequence[RecordStore],
    records: Sequence[Record],
) -> Answers:
    scores = predict(experiment, params, tokenizer, stores)
    labels = [record.raw["label"] for record in records]
    names = make_objective(experiment.config, tokenizer).labels  # type: ignore[attr-defined]
    if names:
        chosen = [names[i] for i in scores.argmax(-1)]
        return Answers(chosen, labels, ("accuracy",))
    numbers = [float(score) for score in scores[:, 0]]
    return Answers(numbers, [float(label) for label in labels], ("pearson", "spearman"))


def _find_spans(
    experiment: Experiment,
    params: Params,
    tokenizer: Tokenizer,
    stores: Sequence[RecordStore],
    records: Sequence[Record],
) -> Answers:
    objective: Any = make_objective(experiment.config, tokenizer)
    scores_NL2 = predict(experiment, params, tokenizer, stores)
    may_lack = any(record.raw["is_impossible"] for record in records)
    texts: list[str] = []
    for store in stores:
        windows = objective.examples(store, training=False)
        of_store_NL2, scores_NL2 = np.split(scores_NL2, [len(windows)])
        texts += span_answers(objective, windows, of_store_NL2, may_lack)
    references = [[answer["text"] for answer in record.raw["answers"]] for record in records]
    return Answers(texts, references, ("squad",))


def predict(
    experiment: Experiment,
    params: Params,
    tokenizer: Tokenizer,
    stores: Sequence[RecordStore],
) -> np.ndarray:
    """What the objective's `predict` says of every example of the stores, [examples, …]."""
    batches = experiment.evaluation_batches(tokenizer, stores)
    dispatches = [range(i, i + 1) for i in range(len(batches))]
    found = [
        jax.device_get(experiment.predict_steps(params, batch))[0]
        for batch in prefetch(batches, dispatches, experiment.batch_sharding)
    ]
    return np.concatenate(found)[: len(batches.examples)]


TASKS: dict[str, Callable[..., Answers]] = {
    "seq2seq": _transduce,
    "classification": _classify,
    "span_qa": _find_spans,
}
