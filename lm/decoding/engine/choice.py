"""Selection of the engine for a model."""

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
    """Open the engine of a generative model: paged if all its layers are attention.

    Args:
        experiment: experiment on a mesh, with its tokenizer.
        params: parameters.
        options: sizes.
        names: names of low-rank adapters.
        adapters: the adapters, or None.
        draft: smaller model for speculative decoding, or None.

    Raises:
        UserError: adapters or a draft model are given, but the model's engine supports neither.
    """
    mixer = getattr(experiment.model.config, "mixer", "")  # type: ignore[attr-defined]
    if is_pageable(experiment) and not (names and mixer != "attention"):
        return PagedEngine(experiment, params, options, names, adapters, draft)
    if names or options.n_proposed:
        raise UserError("--adapter and --speculate need a decoder whose layers are all attention")
    return WholeBatchEngine(experiment, params, options.n_rows)
