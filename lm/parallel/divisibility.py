"""Whether a configuration's batches and layers divide among the devices of a mesh."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from ml_collections import ConfigDict

from lm.config.rules import TRANSFORMERS
from lm.errors import UserError
from lm.parallel.mesh import PipelineSchedule
from lm.parallel.sharding import BATCH_AXES


def pipeline_schedule(config: ConfigDict, sizes: Mapping[str, int]) -> PipelineSchedule:
    """The schedule of the pipeline on a mesh of these `sizes`: without stages one of one part."""
    model, options, stages = config.model, config.parallel.pipeline, sizes["stage"]
    if stages == 1:
        return PipelineSchedule(1, 1, 1)
    if model.family not in TRANSFORMERS:
        raise UserError(
            f"--config.parallel.mesh.stage={stages} needs --config.model.family "
            f"{' or '.join(TRANSFORMERS)}, not {model.family}"
        )
    for name, plain in (("residual", "sum"), ("dense_layers", 0)):
        if model[name] != plain:
            raise UserError(
                f"--config.parallel.mesh.stage={stages} needs layers of one shape, not "
                f"--config.model.{name}={model[name]}"
            )
    every = model.experts_every if model.n_experts else 1
    groups = stages * options.repeats * every
    stacks = ["n_layers", "n_decoder_layers"][: 1 + (model.family == "encoder_decoder")]
    for name in stacks:
        if model[name] % groups:
            raise UserError(
                f"--config.model.{name}={model[name]} is not divisible by {groups} "
                f"({stages} --config.parallel.mesh.stage × "
                f"{options.repeats} --config.parallel.pipeline.repeats"
                + (f" × {every} --config.model.experts_every)" if every > 1 else ")")
            )
    microbatches = options.microbatches or stages
    if microbatches % stages:
        raise UserError(
            f"--config.parallel.pipeline.microbatches={microbatches} is not a multiple of "
            f"--config.parallel.mesh.stage={stages}"
        )
    return PipelineSchedule(stages, microbatches, options.repeats)


def check_batches(config: ConfigDict, sizes: Mapping[str, int], schedule: PipelineSchedule) -> None:
    """Raise UserError unless training and validation batches divide into equal parts."""
    shards = prod(sizes[axis] for axis in BATCH_AXES)
    in_pipeline = schedule.microbatches
    for name, accumulated in (("data", config.train.microbatches), ("eval", 1)):
        parts = shards * accumulated * in_pipeline
        factors = [f"{shards} data-parallel devices"]
        factors += [f"{accumulated} --config.train.microbatches"] if accumulated > 1 else []
        factors += (
            [f"{in_pipeline} --config.parallel.pipeline.microbatches"] if in_pipeline > 1 else []
        )
        if config[name].batch_size % parts:
            raise UserError(
                f"--config.{name}.batch_size={config[name].batch_size} is not divisible by {parts} "
                f"({' × '.join(factors)})"
            )
