"""Choice of the engine that serves a model."""

from __future__ import annotations

from collections.abc import Sequence

from lm.decoding.engine.adapters import Adapters
from lm.decoding.engine.engine import PagedEngine
from lm.decoding.engine.requests import Engine
from lm.decoding.engine.sizes import EngineOptions, is_pageable
from lm.decoding.engine.whole_batches import WholeBatchEngine
from lm.errors import UserError
from lm.experiment import Experiment
from lm.models.variables import Params


def open_engine(
    experiment: Experiment,
    params: Params,
    options: EngineOptions,
    names: Sequence[str] = (),
    adapters: Adapters | None = None,
    draft: tuple[Experiment, Params] | None = None,
) -> Engine:
    """Return an engine of a model that generates: a paged one where all its layers are attention.

    Args:
        experiment: experiment on a mesh, with its tokenizer.
        params: its parameters.
        options: sizes.
        names: names of low-rank adapters.
        adapters: the adapters; None: there are none.
        draft: smaller model that proposes tokens; None: there is none.

    Raises:
        UserError: there are adapters or proposals, which the engine of this model has not.
    """
    mixer = getattr(experiment.model.config, "mixer", "")  # type: ignore[attr-defined]
    if is_pageable(experiment) and not (names and mixer != "attention"):
        return PagedEngine(experiment, params, options, names, adapters, draft)
    if names or options.n_proposed:
        raise UserError("--adapter and --speculate need a decoder whose layers are all attention")
    return WholeBatchEngine(experiment, params, options.n_rows)
