"""How large a run is: parameters, and the tokens and FLOPs of one of its steps."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax

from lm.accounting.flops import model_flops_per_token, tokens_per_row
from lm.accounting.parameter_counts import count_parameters
from lm.experiment import build
from lm.runs.workdir import load_config

# The sizes do not depend on the mesh or kernel, which this machine may not have.
SINGLE_DEVICE = {
    "parallel.preset": "custom",
    "model.attention": "xla",
    **{
        f"parallel.mesh.{axis}": "1"
        for axis in ("slice", "stage", "data", "fsdp", "expert", "context", "tensor")
    },
}


class Size(NamedTuple):
    """Parameters in all and without embeddings; tokens and model FLOPs of a step."""

    parameters: int
    non_embedding: int
    tokens_per_step: int
    flops_per_step: float


def size_of(workdir: Path) -> Size:
    """The size of the run in `workdir`, from its configuration alone; nothing is computed."""
    experiment = build(load_config(workdir, SINGLE_DEVICE), jax.devices()[:1])
    counts = count_parameters(experiment)
    tokens = experiment.config.data.batch_size * tokens_per_row(experiment)
    flops = tokens * model_flops_per_token(experiment)
    heads = counts["heads"]
    return Size(counts["total"] + heads, counts["non_embedding"] + heads, tokens, flops)
