"""`lm merge`: a run of its own from another's adapted or averaged parameters."""

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
from lm.parallel.hosts import is_lead
from lm.runs.checkpoints import Checkpoints
from lm.runs.saved_params import Report, saved_checkpoints
from lm.runs.workdir import RUN_FILE, load_config
from lm.storage import write_atomically
from lm.training.trainer import restore_params

# What makes of an adapted run's configuration that of the merged model.
MERGED_OVERRIDES = {"lora.rank": "0", "optimizer.freeze": "", "init.from": ""}


def merge_run(
    workdir: Path, to: Path, average: int, overrides: dict[str, str], report: Report
) -> int:
    """Write the run in `workdir` to the folder `to` with low-rank updates merged into the kernels,
    averaged over its last `average` checkpoints; its step.

    `overrides` (of the mesh) hold for this process only. UserError if `to` holds a run already.
    """
    if to.exists() and any(to.iterdir()):
        raise UserError(f"{to} is not empty; name another folder")
    config = load_config(workdir, MERGED_OVERRIDES)
    experiment = build(load_config(workdir, MERGED_OVERRIDES | overrides), jax.devices())
    params, step = restore_params(experiment, workdir, average)
    state = replace(experiment.init_state(), step=jnp.asarray(step, jnp.int32), params=params)
    metadata = {
        "config": json.loads(config.to_json()),
        "fingerprint": saved_checkpoints(workdir, report)[0].metadata["fingerprint"],
        **plugin_metadata(),
    }
    if is_lead():
        shutil.copytree(workdir / "tokenizer", to / "tokenizer")
        write_atomically(to / RUN_FILE, json.dumps(metadata, indent=1))
    checkpoints = Checkpoints(to / "checkpoints", config.checkpoint, metadata)
    checkpoints.save(step, state)
    checkpoints.close()
    return step
