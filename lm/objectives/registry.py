"""Objectives by name."""

from __future__ import annotations

from ml_collections import ConfigDict

from lm.objectives.causal import Causal
from lm.objectives.objective import Objective

OBJECTIVES = {"causal": lambda config: Causal(config.data.isolate_documents)}


def make_objective(config: ConfigDict) -> Objective:
    """The objective that `config.objective.name` names."""
    return OBJECTIVES[config.objective.name](config)
