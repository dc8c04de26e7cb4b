"""Merged run: a run of its own from another's parameters, LoRA updates merged or averaged."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp

from lm.config.experiment_file import plugin_metadata
from lm.errors import UserError
from lm.experiment import build
from lm.parallel.mesh import is_primary_host
from lm.runs.checkpoints import Checkpoints, Log
from lm.runs.saved_params import restore_params, saved_checkpoints
from lm.runs.workdir import MERGED_OVERRIDES, RUN_FILE, load_run_config
from lm.storage import write_atomically


def merge_run(workdir: Path, to: Path, average: int, overrides: dict[str, str], log: Log) -> int:
    """Write the run in `workdir` to the folder `to` with its LoRA updates merged into the kernels.

    Args:
        workdir: folder of the run.
        to: empty folder of the new run.
        average: number of newest checkpoints whose parameters are averaged.
        overrides: configuration of this process (its mesh); not written.
        log: receives the lines for the user.

    Returns:
        The step of the newest checkpoint read.

    Raises:
        UserError: `to` is not empty.
    """
    if to.exists() and any(to.iterdir()):
        raise UserError(f"{to} is not empty; name another folder")
    config = load_run_config(workdir, MERGED_OVERRIDES)
    experiment = build(load_run_config(workdir, MERGED_OVERRIDES | overrides), jax.devices())
    params, step = restore_params(experiment, workdir, log, average)
    state = replace(experiment.init_state(), step=jnp.asarray(step, jnp.int32))
    state = state.with_inference_params(params)
    metadata = {
        "config": json.loads(config.to_json()),
        "fingerprint": saved_checkpoints(workdir, log)[0].metadata["fingerprint"],
        **plugin_metadata(),
    }
    if is_primary_host():
        shutil.copytree(workdir / "tokenizer", to / "tokenizer")
        write_atomically(to / RUN_FILE, json.dumps(metadata, indent=1))
    checkpoints = Checkpoints(to / "checkpoints", config.checkpoint, metadata)
    checkpoints.save(step, state)
    checkpoints.close()
    return step
