"""Log-probabilities of the reference, computed once before training (`objective.reference`).

They are files of the run, one for each set of records, so that a later start and `lm eval` read
what the first one computed.
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
    """Return the experiment of a training run with the log-probabilities of its reference.

    What a later start does not find is computed again, from the parameters that the run began with.

    Args:
        experiment: experiment, built with its tokenizer.
        dataset: its data.
        state: state that it starts or continues with.
        workdir: folder of the run.
        log: receives a line for every set of records that is computed.
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
    """Return an experiment whose objective has the log-probabilities of its reference.

    Args:
        experiment: experiment, built with its tokenizer.
        stores: stores of records.
        workdir: folder of the run.
        log: receives a line for every set of records that is computed.
        start: returns the parameters that training starts from; None: read files alone, and leave
            out sets that have none.
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
            log(f"log-probabilities of the reference: {n} records of {store.manifest.source}")
            if is_primary_host():
                _write(file, known)
        if known is not None:
            found[key] = known
    return _replaced(experiment, replace(objective, precomputed=found))


def _compute(experiment: Experiment, params: Params, store: RecordStore) -> np.ndarray:
    return np.asarray(predict(experiment, params, [store]), np.float32)


def _read(file: Path, n: int) -> np.ndarray | None:
    """Return the log-probabilities of n records, None if there is no whole file of them."""
    try:
        known = np.load(file)
    except (OSError, ValueError, EOFError):
        return None
    return known if known.shape == (n, HALVES) and known.dtype == np.float32 else None


def _write(file: Path, known: np.ndarray) -> None:
    """Write a file that is there whole or not at all."""
    file.parent.mkdir(exist_ok=True)
    content = io.BytesIO()
    np.save(content, known)
    temporary = file.with_name(f".{file.name}.tmp")
    write_durably(temporary, content.getvalue())
    temporary.replace(file)
    upload_changes()


def _replaced(experiment: Experiment, objective: Preferences) -> Experiment:
    return replace(experiment, steps=replace(experiment.steps, objective=objective))
