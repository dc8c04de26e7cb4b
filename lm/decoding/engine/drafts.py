"""Draft models of speculative decoding."""

from __future__ import annotations

from typing import Any

from lm.decoding.engine.sizes import is_pageable
from lm.decoding.weights import prepare
from lm.errors import UserError
from lm.experiment import Experiment
from lm.models.variables import Params


def prepare_draft(
    experiment: Experiment, params: Params, vocab_size: int
) -> tuple[Experiment, Params]:
    """Prepare a draft model for decoding.

    Args:
        experiment: experiment on a mesh.
        params: parameters.
        vocab_size: vocabulary size of the model that verifies the proposals.

    Raises:
        UserError: the model does not continue texts with the same vocabulary.
    """
    experiment, params = prepare(experiment, params)
    config: Any = experiment.model.config  # type: ignore[attr-defined]
    if not is_pageable(experiment) or config.vocab_size != vocab_size:
        raise UserError(
            f"a draft model must be a decoder with attention and a vocabulary of {vocab_size}"
        )
    return experiment, params
