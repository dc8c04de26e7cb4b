"""Counting parameters, by the definitions that papers use."""

from __future__ import annotations

from typing import Any

import jax

from lm.experiment import Experiment


def count_parameters(experiment: Experiment) -> dict[str, Any]:
    """`total`, `non_embedding`, and `tensors`: shape and axis names of every parameter.

    Non-embedding leaves out token and position tables and an untied output head.
    """
    tensors = {}
    total = embedding = 0
    leaves = jax.tree.leaves_with_path(experiment.state_shapes.params)
    for (path, leaf), names in zip(leaves, jax.tree.leaves(experiment.param_names), strict=True):
        keys = [str(part.key) for part in path]
        tensors["/".join(keys)] = (leaf.shape, tuple(names))
        total += leaf.size
        embedding += leaf.size if keys[-1] == "embedding" or keys[0] == "head" else 0
    return {"total": total, "non_embedding": total - embedding, "tensors": tensors}
