"""Counting parameters, by the definitions that papers use."""

from __future__ import annotations

import re
from typing import Any

from lm.experiment import Experiment
from lm.optim.parameter_groups import flat

EMBEDDINGS = re.compile(r"(tokens|contexts|positions|types)/embedding")
BERT_HEADS = re.compile(r"(transform|transform_norm|logit_bias|sentence_head)/")


def count_parameters(experiment: Experiment) -> dict[str, Any]:
    """`total`, `active`, `non_embedding`, `heads`, and `tensors`: shape and axis names of each.

    Active are those that a token uses: not all experts. Non-embedding leaves out the tables of
    tokens, positions and token types, and an untied output layer; norms, biases and relative
    positions stay, and so does the output layer of an NPLM, which is most of it. BERT is, as
    published, its encoder and pooler: the heads of its two objectives are counted apart.
    """
    shapes, names = flat(experiment.param_shapes), flat(experiment.param_names)
    every = {path: leaf.size for path, leaf in shapes.items()}
    sizes = {path: n for path, n in every.items() if not is_head(experiment, path)}
    return {
        "total": sum(sizes.values()),
        "active": round(sum(n * used_share(experiment, path) for path, n in sizes.items())),
        "non_embedding": sum(n for path, n in sizes.items() if not is_embedding(experiment, path)),
        "heads": sum(every.values()) - sum(sizes.values()),
        "tensors": {path: (leaf.shape, tuple(names[path])) for path, leaf in shapes.items()},
    }


def is_head(experiment: Experiment, path: str) -> bool:
    """Whether a parameter is of the objectives that BERT is pretrained by, not of BERT."""
    return experiment.config.objective.next_sentence and bool(BERT_HEADS.match(path))


def is_embedding(experiment: Experiment, path: str) -> bool:
    """Whether a parameter is of a look-up table or of an untied output layer (not of an NPLM)."""
    is_output = path.startswith("head/") and experiment.config.model.family != "nplm"
    return is_output or bool(EMBEDDINGS.match(path))


def used_share(experiment: Experiment, path: str) -> float:
    """The part of a parameter that one token uses."""
    model = experiment.config.model
    return model.experts_per_token / model.n_experts if "/experts/" in path else 1.0
