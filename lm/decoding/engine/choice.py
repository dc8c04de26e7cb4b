"""Choice of the engine that serves a model."""

from __future__ import annotations

from lm.decoding.engine.requests import Engine
from lm.decoding.engine.whole_batches import WholeBatchEngine
from lm.experiment import Experiment
from lm.models.variables import Params


def open_engine(experiment: Experiment, params: Params, n_rows: int) -> Engine:
    """Return an engine of a model that generates.

    Args:
        experiment: experiment on a mesh, with its tokenizer.
        params: its parameters.
        n_rows: most requests that run at once.
    """
    return WholeBatchEngine(experiment, params, n_rows)
