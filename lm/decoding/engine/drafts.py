"""Draft models of speculative decoding."""

from __future__ import annotations

from typing import Any

from lm.decoding.engine.programs import DraftModel
from lm.decoding.engine.sizes import is_pageable, make_pages
from lm.decoding.weights import prepare
from lm.errors import UserError
from lm.experiment import Experiment
from lm.models.layer_pages import Pages
from lm.models.variables import Params


def open_draft(
    experiment: Experiment, params: Params, vocab_size: int, n_pages: int, page_size: int
) -> tuple[DraftModel, Pages]:
    """Return a draft model as an engine takes it, and pages for it.

    Args:
        experiment: experiment on a mesh.
        params: its parameters.
        vocab_size: tokens of the model that checks the proposals.
        n_pages: pages of that model's cache.
        page_size: tokens of a page.

    Raises:
        UserError: the model does not continue texts of the same tokens.
    """
    experiment, params = prepare(experiment, params)
    config: Any = experiment.model.config  # type: ignore[attr-defined]
    if not is_pageable(experiment) or config.vocab_size != vocab_size:
        raise UserError(
            f"a draft model is a decoder with attention and a vocabulary of {vocab_size}"
        )
    return DraftModel(experiment.model, params), make_pages(experiment, n_pages, page_size)
