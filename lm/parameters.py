"""Counting parameters, by the definitions that papers use."""

from __future__ import annotations

import re
from typing import Any

from lm.experiment import Experiment
from lm.optim.parameter_groups import flat


def count_parameters(experiment: Experiment) -> dict[str, Any]:
    """`total`, `active`, `non_embedding`, and `tensors`: shape and axis names of every parameter.

    Active are those that a token uses: not all experts. Non-embedding leaves out the tables of
    tokens, positions and token types, and an untied output layer; norms, biases and relative
    positions stay, and so does the output layer of an NPLM, which is most of it.
    """
    left_out = r"(tokens|contexts|positions|types)/embedding"
    if experiment.config.model.family != "nplm":
        left_out += "|head/"
    shapes, names = flat(experiment.state_shapes.params), flat(experiment.param_names)
    sizes = {path: leaf.size for path, leaf in shapes.items()}
    return {
        "total": sum(sizes.values()),
        "active": round(sum(n * used_share(experiment, path) for path, n in sizes.items())),
        "non_embedding": sum(n for path, n in sizes.items() if not re.match(left_out, path)),
        "tensors": {path: (leaf.shape, tuple(names[path])) for path, leaf in shapes.items()},
    }


def used_share(experiment: Experiment, path: str) -> float:
    """The part of a parameter that one token uses."""
    model = experiment.config.model
    return model.experts_per_token / model.n_experts if "/experts/" in path else 1.0
