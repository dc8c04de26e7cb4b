"""Initialization of a run's frozen models: copied from its parameters or loaded from a run."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp

from lm.data.tokenizer import Tokenizer
from lm.errors import UserError
from lm.experiment import Experiment
from lm.models.frozen import REFERENCE, TEACHER
from lm.models.variables import FROZEN, Params, flat, nested
from lm.runs.checkpoints import Log
from lm.runs.saved_params import mean_params, saved_checkpoints
from lm.storage import resolve_path
from lm.train_step import TrainState


def with_frozen_models(
    experiment: Experiment, state: TrainState, tokenizer: Tokenizer, log: Log
) -> TrainState:
    """Return the initial state with the parameters of its frozen models.

    Args:
        experiment: the experiment.
        state: initial state with all other parameters set.
        tokenizer: tokenizer of the run.
        log: called with a line for each loaded model.

    Raises:
        UserError: a teacher cannot be loaded, or has a different vocabulary.
    """
    params = state.params
    frozen = dict(params.get(FROZEN, {}))
    if REFERENCE in frozen:
        if not experiment.config.init["from"]:
            log("note: the reference is untrained; --config.init.from=RUN starts from a run")
        jax.tree.map(lambda x: x.delete(), frozen[REFERENCE])
        own = {name: params[name] for name in frozen[REFERENCE]}
        frozen[REFERENCE] = jax.tree.map(jnp.copy, own)
    if TEACHER in frozen:
        frozen[TEACHER] = _teacher(experiment, frozen[TEACHER], tokenizer, log)
    return replace(state, params={**params, FROZEN: frozen}) if frozen else state


def _teacher(experiment: Experiment, fresh: Params, tokenizer: Tokenizer, log: Log) -> Params:
    """Return the parameters of `objective.teacher`."""
    place = experiment.config.objective.teacher
    checkpoints = saved_checkpoints(resolve_path(place), log)
    theirs = checkpoints[0].metadata["fingerprint"]["tokenizer"]
    if theirs and theirs != tokenizer.digest:
        raise UserError(
            f"--config.objective.teacher={place} has a different tokenizer: use that one"
        )
    prefix = f"{FROZEN}/{TEACHER}/"
    shardings = {
        path.removeprefix(prefix): sharding
        for path, sharding in flat(experiment.inference_sharding).items()
        if path.startswith(prefix)
    }
    missing = sorted(shardings.keys() - checkpoints[0].shapes.keys())
    if missing:
        raise UserError(f"--config.objective.teacher={place} has no parameter {missing[0]}")
    jax.tree.map(lambda x: x.delete(), fresh)
    found, (step,) = mean_params(checkpoints, 1, shardings, log)
    log(f"teacher: {place}, step {step}: {sum(x.size for x in found.values()):,} numbers")
    return nested(found)
