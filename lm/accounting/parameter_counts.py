"""Parameter counts by the definitions that papers use, and where parameters lie on a mesh."""

from __future__ import annotations

from math import prod
from typing import Any

from lm.experiment import Experiment
from lm.models.variables import Kind, Role
from lm.optim.parameter_groups import flat


def count_parameters(experiment: Experiment) -> dict[str, Any]:
    """Count the parameters of a model, by the definitions that papers use.

    Returns:
        "total": all but "heads". BERT is, as published, its encoder and pooler.
        "active": those that a token uses, so not all experts.
        "non_embedding": without the tables of tokens, positions and token types and without an
            untied output layer. Norms, biases and relative positions stay, and so does the output
            layer of an NPLM, which is most of it.
        "heads": heads of BERT's two pretraining objectives.
        "tensors": shape and logical axes of each parameter, by path.
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


def parameter_table(experiment: Experiment) -> list[dict[str, Any]]:
    """Return every parameter, with where it lies on the experiment's mesh.

    Returns:
        For each parameter: "name", "shape", "axes" (logical names), "role", "spec" (of its
        PartitionSpec, for each axis the mesh axes that shard it or None) and "bytes" on one device.
    """
    shapes, infos = flat(experiment.param_shapes), experiment.param_infos
    shardings = flat(experiment.state_sharding.params)
    return [
        {
            "name": path,
            "shape": leaf.shape,
            "axes": infos[path].axes,
            "role": _role_text(infos[path].role),
            "spec": tuple(shardings[path].spec),
            "bytes": prod(shardings[path].shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        }
        for path, leaf in shapes.items()
    ]


def _role_text(role: Role) -> str:
    notes = ["tied"] * role.tied + ["expert"] * role.expert
    notes += [role.stream] if role.stream != "target" else []
    return str(role.kind) + (f" ({', '.join(notes)})" if notes else "")


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
