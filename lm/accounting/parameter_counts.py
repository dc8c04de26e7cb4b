"""Counting parameters, by the definitions that papers use."""

from __future__ import annotations

from typing import Any

from lm.experiment import Experiment
from lm.models.variables import Kind
from lm.optim.parameter_groups import flat


def count_parameters(experiment: Experiment) -> dict[str, Any]:
    """`total`, `active`, `non_embedding`, `heads`, and `tensors`: shape and axis names of each.

    Active are those that a token uses: not all experts. Non-embedding leaves out the tables of
    tokens, positions and token types, and an untied output layer; norms, biases and relative
    positions stay, and so does the output layer of an NPLM, which is most of it. BERT is, as
    published, its encoder and pooler: the heads of its two objectives are counted apart.
    """
    shapes, infos = flat(experiment.param_shapes), experiment.param_infos
    every = {path: leaf.size for path, leaf in shapes.items()}
    sizes = {path: n for path, n in every.items() if not is_head(experiment, path)}
    return {
        "total": sum(sizes.values()),
        "active": round(sum(n * used_share(experiment, path) for path, n in sizes.items())),
        "non_embedding": sum(n for path, n in sizes.items() if not is_embedding(experiment, path)),
        "heads": sum(every.values()) - sum(sizes.values()),
        "tensors": {path: (leaf.shape, infos[path].axes) for path, leaf in shapes.items()},
    }


def is_head(experiment: Experiment, path: str) -> bool:
    """Return whether a parameter belongs to BERT's pretraining objectives, not to BERT."""
    is_bert = experiment.config.objective.next_sentence
    return is_bert and experiment.param_infos[path].role.part == "pretraining"


def is_embedding(experiment: Experiment, path: str) -> bool:
    """Return whether a parameter belongs to an embedding or to an untied output layer."""
    role = experiment.param_infos[path].role
    return role.kind == Kind.EMBEDDING or role.part == "output"


def used_share(experiment: Experiment, path: str) -> float:
    """Return the part of a parameter that one token uses."""
    model = experiment.config.model
    is_expert = experiment.param_infos[path].role.expert
    return model.experts_per_token / model.n_experts if is_expert else 1.0
