"""Validation of a configuration against a multi-device mesh, and notes for the user."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import lcm, prod
from typing import TYPE_CHECKING

from jax.sharding import Mesh
from ml_collections import ConfigDict

from lm.config.registries import MODELS, OBJECTIVES, STATE_SPACES, TRANSFORMERS
from lm.errors import UserError
from lm.parallel.mesh import BATCH_AXES, CONFIG_KEYS, PARAMETERS, parameter_axes

if TYPE_CHECKING:
    from lm.parallel.pipeline import PipelineSchedule


def mesh_problems(config: ConfigDict, sizes: Mapping[str, int]) -> Iterator[str]:
    """Yield an error message for each reason that a configuration cannot run on a mesh.

    On a single device, only the rules between keys (`lm/config/rules.py`) apply.

    Args:
        config: valid configuration with its defaults filled in.
        sizes: sizes of all mesh axes.
    """
    for rules in (_stage_rules, _batch_rules, _length_rules, _parameter_rules):
        yield from rules(config, sizes)


def _stage_rules(config: ConfigDict, sizes: Mapping[str, int]) -> Iterator[str]:
    model, options, stages = config.model, config.parallel.pipeline, sizes["stage"]
    if stages == 1:
        return
    if model.family not in TRANSFORMERS:
        yield (
            f"--config.parallel.mesh.stage={stages} needs --config.model.family "
            f"{' or '.join(TRANSFORMERS)}, not {model.family}"
        )
    if config.objective.name == "multi_token":
        yield f"--config.parallel.mesh.stage={stages} does not support the modules of multi_token"
    if config.optimizer.qk_clip:
        yield f"--config.parallel.mesh.stage={stages} does not support --config.optimizer.qk_clip"
    pattern_length = _pattern_length(model)
    for name, plain in (
        ("residual", "sum" if model.residual == "concat" else model.residual),
        ("dense_layers", 0),
        ("first_conv", 0),
        ("expert_layers", ()),
        ("first_norm", True),
        ("generator_layers", 0),
        ("attention_layers", model.attention_layers if pattern_length < model.n_layers else ()),
    ):
        if model[name] != plain:
            yield (
                f"--config.parallel.mesh.stage={stages} needs layers of one shape, not "
                f"--config.model.{name}={model[name]}"
            )
    every = lcm(pattern_length, model.experts_every if model.n_experts else 1)
    groups = stages * options.repeats * every
    stacks = ["n_layers", "n_decoder_layers"][: 1 + (model.family == "encoder_decoder")]
    for name in stacks:
        if model[name] % groups:
            yield (
                f"--config.model.{name}={model[name]} is not divisible by {groups} "
                f"({stages} --config.parallel.mesh.stage × "
                f"{options.repeats} --config.parallel.pipeline.repeats"
                + (f" × {every} layers of the repeating pattern)" if every > 1 else ")")
            )
    microbatches = options.microbatches or stages
    if microbatches % stages:
        yield (
            f"--config.parallel.pipeline.microbatches={microbatches} is not a multiple of "
            f"--config.parallel.mesh.stage={stages}"
        )


def _pattern_length(model: ConfigDict) -> int:
    """Return the length of the repeating pattern of `attention_layers`."""
    n = model.n_layers
    marks = [i in model.attention_layers for i in range(n)]
    return next(k for k in range(1, n + 1) if n % k == 0 and marks == marks[:k] * (n // k))


def _batch_rules(config: ConfigDict, sizes: Mapping[str, int]) -> Iterator[str]:
    shards, stages = prod(sizes[axis] for axis in BATCH_AXES), sizes["stage"]
    in_pipeline = (config.parallel.pipeline.microbatches or stages) if stages > 1 else 1
    for name, accumulated in (("data", config.train.microbatches), ("eval", 1)):
        divisor = shards * accumulated * in_pipeline
        factors = [f"{shards} data-parallel devices"]
        factors += [f"{accumulated} --config.train.microbatches"] if accumulated > 1 else []
        factors += (
            [f"{in_pipeline} --config.parallel.pipeline.microbatches"] if in_pipeline > 1 else []
        )
        if config[name].batch_size % divisor:
            yield (
                f"--config.{name}.batch_size={config[name].batch_size} is not divisible by "
                f"{divisor} ({' × '.join(factors)})"
            )


def _length_rules(config: ConfigDict, sizes: Mapping[str, int]) -> Iterator[str]:
    context = sizes["context"]
    if context > 1 and config.model.family not in TRANSFORMERS:
        yield (
            f"--config.parallel.mesh.context={context} needs self-attention, which "
            f"--config.model.family={config.model.family} does not have"
        )
    if context > 1 and config.model.mixer in STATE_SPACES:
        yield (
            f"--config.parallel.mesh.context={context} is not supported with --config.model.mixer="
            f"{config.model.mixer}, whose states pass through whole sequences"
        )
    # Ring attention assigns two chunks of the sequence to each device, to balance causal work.
    divisor = 2 * context if context > 1 else 1
    for name in OBJECTIVES[config.objective.name].length_keys:
        if config.data[name] % divisor:
            yield (
                f"--config.data.{name}={config.data[name]} is not divisible by {divisor} "
                "(2 × --config.parallel.mesh.context)"
            )


def _parameter_rules(config: ConfigDict, sizes: Mapping[str, int]) -> Iterator[str]:
    """Yield an error message for each parameter dimension that the mesh does not divide."""
    model = config.model
    axes = [] if MODELS.entries[model.family].plugin else [("embed", "d_model")]
    is_d_ff_used = model.experts_every > 1 or model.dense_layers or not model.expert_d_ff
    if model.family in TRANSFORMERS:
        axes += [("heads", "n_heads"), *([("mlp", "d_ff")] if is_d_ff_used else [])]
    for axis, key in (("heads", "n_encoder_heads"), ("mlp", "encoder_d_ff")):
        axes += [(axis, key)] if model[key] else []
    if model.embedding_size:
        axes += [("embed", "embedding_size")]
    if model.mixer in STATE_SPACES:
        axes += [("heads", "ssm_heads")]
    if model.n_experts:
        axes += [("experts", "n_experts"), ("mlp", "expert_d_ff"), ("mlp", "shared_expert_d_ff")]
    elif sizes["expert"] > 1:
        yield (
            f"--config.parallel.mesh.expert={sizes['expert']}: the model has no experts "
            "(--config.model.n_experts=0); use data or fsdp"
        )
    for name, key in axes:
        try:
            count_parameter_shards(sizes, (name,), (model[key],))
        except UserError as error:
            yield str(error).replace(f"--config.{CONFIG_KEYS[name]}=", f"--config.model.{key}=")


def count_parameter_shards(
    sizes: Mapping[str, int], names: Sequence[str], shape: Sequence[int]
) -> int:
    """Return the number of shards of a parameter on a mesh with these axis sizes.

    Raises:
        UserError: a dimension is not divisible by the mesh axes that shard it.
    """
    axes = (parameter_axes(sizes, n, size) or () for n, size in zip(names, shape, strict=True))
    return prod(sizes[axis] for of_dimension in axes for axis in of_dimension)


# --- notes before training


def mesh_notes(
    mesh: Mesh,
    pipeline: PipelineSchedule,
    parameters: Mapping[str, tuple[Sequence[str], Sequence[int]]],
) -> list[str]:
    """Return notes on the pipeline schedule and on replicated parameter dimensions.

    Args:
        mesh: mesh of the step.
        pipeline: schedule of the pipeline.
        parameters: logical axes and shape of every parameter, by path.
    """
    lines = []
    if pipeline.stages > 1:
        lines.append(
            f"pipeline of {pipeline.stages} stages × {pipeline.repeats} repeat(s), "
            f"{pipeline.microbatches} microbatches: idle {pipeline.bubble:.1%} of the time"
        )
    for path, (names, shape) in sorted(parameters.items()):
        for axis in replicated_axes(mesh, names, shape):
            lines.append(
                f"{path} {shape}: the mesh does not divide its {axis!r} dimension, which "
                "stays whole on every device"
            )
    return lines


def replicated_axes(mesh: Mesh, names: Sequence[str], shape: Sequence[int]) -> list[str]:
    """Return a parameter's logical axes that are replicated for lack of divisibility."""
    return [
        name
        for name, size in zip(names, shape, strict=True)
        if PARAMETERS[name] and parameter_axes(mesh.shape, name, size) is None
    ]
