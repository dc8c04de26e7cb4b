"""Reference log-probabilities, precomputed once before training (`objective.reference`).

They are stored in the run folder, one file per record set, so that later starts and `lm eval` can
reuse them.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lm.data.dataset import Dataset
from lm.data.record_store import RecordStore
from lm.evaluation.task import predict
from lm.experiment import Experiment
from lm.models.variables import Params
from lm.objectives.preferences import HALVES, Preferences, reference_key
from lm.parallel.mesh import is_primary_host, on_all_hosts
from lm.runs.checkpoints import Log
from lm.storage import upload_changes, write_durably
from lm.train_step import TrainState
from lm.training.warm_start import initial_state

FOLDER = "reference"


def precompute(
    experiment: Experiment, dataset: Dataset, state: TrainState, workdir: Path, log: Log
) -> Experiment:
    """Return the experiment with precomputed log-probabilities of its reference model.

    Missing files are recomputed from the parameters that the run started from.

    Args:
        experiment: experiment, built with its tokenizer.
        dataset: training data.
        state: current training state.
        workdir: folder of the run.
        log: called with a line for every record set that is computed.
    """

    def start() -> Params:
        if not int(jax.device_get(state.step)):
            return state.inference_params
        return initial_state(experiment, dataset.tokenizer, log).inference_params

    return with_precomputed(experiment, (*dataset.train, *dataset.validation), workdir, log, start)


def with_precomputed(
    experiment: Experiment,
    stores: Sequence[Any],
    workdir: Path,
    log: Log,
    start: Callable[[], Params] | None = None,
) -> Experiment:
    """Attach reference log-probabilities to the objective of an experiment.

    Args:
        experiment: experiment, built with its tokenizer.
        stores: stores of records.
        workdir: folder of the run.
        log: called with a line for every record set that is computed.
        start: returns the parameters that training starts from; None: only read existing files,
            and skip record sets without one.
    """
    objective: Any = experiment.objective
    if not isinstance(objective, Preferences) or objective.reference_from != "precomputed":
        return experiment
    found: dict[str, np.ndarray] = {}
    params = None
    for store in stores:
        key = reference_key(store)
        file = workdir / FOLDER / f"{key}.npy"
        n = len(objective.with_reference("none").examples(store, training=False))
        known = _read(file, n)
        if not on_all_hosts(known is not None) and start is not None:
            params = start() if params is None else params
            plain = _replaced(experiment, objective.with_reference("none"))
            known = _compute(plain, params, store)
            log(f"reference log-probabilities: {n} records of {store.manifest.source}")
            if is_primary_host():
                _write(file, known)
        if known is not None:
            found[key] = known
    return _replaced(experiment, replace(objective, precomputed=found))


def _compute(experiment: Experiment, params: Params, store: RecordStore) -> np.ndarray:
    return np.asarray(predict(experiment, params, [store]), np.float32)


def _read(file: Path, n: int) -> np.ndarray | None:
    """Read the log-probabilities of n records; None if the file is missing or incomplete."""
    try:
        known = np.load(file)
    except (OSError, ValueError, EOFError):
        return None
    return known if known.shape == (n, HALVES) and known.dtype == np.float32 else None


def _write(file: Path, known: np.ndarray) -> None:
    """Write a file atomically."""
    file.parent.mkdir(exist_ok=True)
    content = io.BytesIO()
    np.save(content, known)
    temporary = file.with_name(f".{file.name}.tmp")
    write_durably(temporary, content.getvalue())
    temporary.replace(file)
    upload_changes()


def _replaced(experiment: Experiment, objective: Preferences) -> Experiment:
    return replace(experiment, steps=replace(experiment.steps, objective=objective))
