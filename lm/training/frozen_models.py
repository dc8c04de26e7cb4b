"""Parameters of the frozen models beside a new run: copied from its own, or loaded from a run."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp

from lm.data.tokenizer import Tokenizer
from lm.experiment import Experiment
from lm.models.frozen import REFERENCE
from lm.models.variables import FROZEN
from lm.runs.checkpoints import Log
from lm.train_step import TrainState


def with_frozen_models(
    experiment: Experiment, state: TrainState, tokenizer: Tokenizer, log: Log
) -> TrainState:
    """Return the state before the first step with the parameters of its frozen models.

    Args:
        experiment: the experiment.
        state: its state, whose other parameters are those to start from.
        tokenizer: its tokenizer.
        log: receives a line for each that is loaded.

    Raises:
        UserError: a teacher cannot be loaded, or has another vocabulary.
    """
    params = state.params
    frozen = dict(params.get(FROZEN, {}))
    if REFERENCE in frozen:
        jax.tree.map(lambda x: x.delete(), frozen[REFERENCE])
        own = {name: params[name] for name in frozen[REFERENCE]}
        frozen[REFERENCE] = jax.tree.map(jnp.copy, own)
    return replace(state, params={**params, FROZEN: frozen}) if frozen else state
