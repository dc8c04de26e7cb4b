"""Tasks (`lm eval --task`): answer every record of a split, and score the answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import jax
import numpy as np

from lm.config.registry import listed
from lm.data.batches import prefetch
from lm.data.record_store import RecordStore
from lm.decoding.batch import decode_best
from lm.decoding.beam import BeamOptions
from lm.decoding.text_stream import text_after
from lm.errors import UserError
from lm.evaluation.scores import score_predictions
from lm.experiment import Experiment
from lm.models.variables import Params
from lm.objectives.objective import Answer
from lm.parallel.mesh import is_primary_host, on_all_hosts
from lm.progress import progress_bar, track
from lm.storage import storage_path

Task = Callable[[Experiment, Params, Sequence[RecordStore], bool], list[Answer]]


def evaluate_task(
    experiment: Experiment, params: Params, stores: Sequence[RecordStore], progress: bool = False
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Answer and score all records.

    Args:
        experiment: experiment, built with its tokenizer.
        params: trained parameters.
        stores: stores of records.
        progress: show progress on stderr.

    Returns:
        Scores by `eval.metrics` or the objective's default metrics, and "n"; an undefined score,
        such as a correlation with a constant, is None. And each record with its "prediction".
    """
    objective = experiment.objective
    for store in stores:
        objective.require_columns(store)
    records = list(chain.from_iterable(stores))
    predictions = TASKS[objective.task](experiment, params, stores, progress)
    references = [objective.reference(record) for record in records]
    names = listed(experiment.config.eval.metrics) or objective.metrics
    measured = score_predictions(names, predictions, references, experiment.config.eval)
    scores = {name: None if score != score else score for name, score in measured.items()}
    rows = [
        {**record.raw, "prediction": prediction}
        for record, prediction in zip(records, predictions, strict=True)
    ]
    return {"n": len(records), **scores}, rows


def check_task(experiment: Experiment) -> None:
    """Raise UserError if the objective has no task."""
    if not experiment.objective.task:
        name = experiment.config.objective.name
        raise UserError(f"--config.objective.name={name} has no task: run lm eval without --task")


def require_writable(folder: Path) -> None:
    """Raise UserError on all processes unless the primary host can write to a folder."""
    problem = ""
    if is_primary_host():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=folder) as probe:
                probe.write(b" ")
        except OSError as error:
            problem = f" ({error.strerror})"
    if not on_all_hosts(not problem):
        where = storage_path(folder)
        raise UserError(f"cannot write the report to {where}{problem}: name another --output")


def write_task_report(folder: Path, report: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Write `report.json` and `predictions.jsonl` to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    for name, text in (
        ("report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n"),
        ("predictions.jsonl", "".join(lines)),
    ):
        # A lone surrogate, which UTF-8 cannot encode, becomes its JSON escape.
        (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")


def _generate(
    experiment: Experiment, params: Params, stores: Sequence[RecordStore], progress: bool
) -> list[Answer]:
    """Decode answers from the sources of the records."""
    tokenizer = experiment.tokenizer
    assert tokenizer is not None
    sources = [experiment.objective.source(record) for record in chain.from_iterable(stores)]
    ends = experiment.objective.end_ids(tokenizer)
    options = BeamOptions.from_config(experiment.config, tokenizer, ends)
    with progress_bar("decoding", len(sources), shown=progress, unit="record") as bar:
        outputs = decode_best(experiment, params, tokenizer, sources, options, bar.update)
    return [text_after(tokenizer, [], ids) for ids in outputs]


def _predict(
    experiment: Experiment, params: Params, stores: Sequence[RecordStore], progress: bool
) -> list[Answer]:
    """Compute answers from the outputs of the objective's `predict`."""
    return experiment.objective.answers(stores, predict(experiment, params, stores, progress))


def predict(
    experiment: Experiment, params: Params, stores: Sequence[RecordStore], progress: bool = False
) -> np.ndarray:
    """Return the outputs of the objective's `predict` for all examples, [examples, …]."""
    batches = experiment.evaluation_batches(stores)
    dispatches = [range(i, i + 1) for i in range(len(batches))]
    arrays = prefetch(batches, dispatches, experiment.batch_sharding)
    with closing(arrays):
        outputs = [
            jax.device_get(experiment.predict_steps(params, batch))[0]
            for batch in track(arrays, len(dispatches), description="predicting", shown=progress)
        ]
    return np.concatenate(outputs)[: len(batches.examples)]


# Values of `Objective.task`.
TASKS: dict[str, Task] = {"generate": _generate, "predict": _predict}
