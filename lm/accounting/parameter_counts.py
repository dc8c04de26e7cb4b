"""Parameter counts as defined in papers, and the sharding of parameters on a mesh."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import jax

from lm import config as configs
from lm.accounting.flops import stream_tokens, tokens_per_row, used_share
from lm.config.ramps import full_rows
from lm.data.tokenizer import is_fitted
from lm.experiment import Experiment, build_untraced
from lm.models.variables import Kind, Role, flat


def count_parameters(experiment: Experiment) -> dict[str, Any]:
    """Count the parameters of a model, as defined in papers.

    Returns:
        "total": all except "heads". As published, BERT counts its encoder and pooler, ELECTRA its
            discriminator's encoder.
        "active": parameters that a token uses, so not all experts.
        "non_embedding": without tables of tokens, positions and token types, and without an untied
            output layer. Norms, biases and relative positions are included, and so is the output
            layer of an NPLM, which is most of it.
        "heads": pretraining heads of BERT and ELECTRA, including ELECTRA's generator.
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
    """List every parameter with its sharding on the experiment's mesh.

    Returns:
        For each parameter: "name", "shape", "axes" (logical names), "role", "spec" (mesh axes that
        shard each axis, or None) and "bytes" per device.
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


def is_embedding(experiment: Experiment, path: str) -> bool:
    """Return whether a parameter belongs to an embedding or an untied output layer."""
    role = experiment.param_infos[path].role
    return role.kind == Kind.EMBEDDING or role.part == "output"


def is_head(experiment: Experiment, path: str) -> bool:
    """Return whether a parameter is only used in the pretraining of BERT or ELECTRA."""
    has_generator = "generator" in experiment.param_shapes
    if not (has_generator or experiment.config.objective.next_sentence):
        return False
    of_generator = path.startswith("generator/")
    return of_generator or experiment.param_infos[path].role.part == "pretraining"


def training_cost(experiment: Experiment) -> tuple[int, float]:
    """Return the tokens D of a training run, and its FLOPs estimated as 6 N D.

    N are the non-embedding parameters (Kaplan et al. 2020, §2.1), for experts those that a token
    uses, each times the tokens that pass through it: source tokens do not pass through a decoder.
    Attention products and the output matrix are excluded.
    """
    config, tokens = experiment.config, stream_tokens(experiment)
    per_row = sum(
        leaf.size * used_share(experiment, path) * tokens[experiment.param_infos[path].role.stream]
        for path, leaf in flat(experiment.param_shapes).items()
        if not is_embedding(experiment, path)
    )
    rows = full_rows(config.data, config.train.steps)
    return round(rows * tokens_per_row(experiment)), 6.0 * rows * per_row


def variant_size(spec: str, overrides: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return parameter counts and training cost of an experiment, without reading its data.

    Args:
        spec: `FILE.py[:VARIANT]`.
        overrides: text of configuration keys, by dotted path.

    Returns:
        "config", "paper", the counts of `count_parameters`, "batch_tokens", "tokens" and "flops"
        (`training_cost`), and "note". If the vocabulary size depends on a tokenizer fitted to the
        corpus, the counts are None and the note says why.
    """
    config = configs.load_config(spec, overrides)
    counts = dict.fromkeys(("total", "active", "non_embedding", "heads"))
    cost = dict.fromkeys(("batch_tokens", "tokens", "flops"))
    note = ""
    if config.model.vocab_size or not is_fitted(config.data.tokenizer):
        experiment = build_untraced(config, jax.devices()[:1])
        counts |= count_parameters(experiment)
        del counts["tensors"]
        cost["tokens"], cost["flops"] = training_cost(experiment)
        cost["batch_tokens"] = config.data.batch_size * tokens_per_row(experiment)
    else:
        note = (
            "the vocabulary is fitted to the corpus "
            f"(--config.data.tokenizer={config.data.tokenizer})"
        )
    return {"config": spec, "paper": config.paper, **counts, **cost, "note": note}
