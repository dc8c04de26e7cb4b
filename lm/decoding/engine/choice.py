"""Choice of the engine that serves a model."""

from __future__ import annotations

from lm.decoding.engine.engine import EngineOptions, PagedEngine, is_pageable
from lm.decoding.engine.requests import Engine
from lm.decoding.engine.whole_batches import WholeBatchEngine
from lm.experiment import Experiment
from lm.models.variables import Params


def open_engine(experiment: Experiment, params: Params, options: EngineOptions) -> Engine:
    """Return an engine of a model that generates: a paged one where all its layers are attention.

    Args:
        experiment: experiment on a mesh, with its tokenizer.
        params: its parameters.
        options: sizes.
    """
    if is_pageable(experiment):
        return PagedEngine(experiment, params, options)
    return WholeBatchEngine(experiment, params, options.n_rows)
