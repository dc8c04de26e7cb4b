"""Opening the run that a verb is about."""

from __future__ import annotations

import argparse
from typing import Any

from lm.cli.arguments import Overrides
from lm.errors import UserError
from lm.storage import open_folder


def load_run(
    args: argparse.Namespace, overrides: Overrides, any_batch: bool = False
) -> tuple[Any, Any, int]:
    """The experiment, parameters and step of the run in --workdir, on all devices.

    With `any_batch` the run's batch sizes do not matter, and are made what the devices divide.
    """
    import jax

    from lm.experiment import build
    from lm.parallel.mesh import AXES
    from lm.runs.workdir import load_config
    from lm.training.merging import MERGED_OVERRIDES
    from lm.training.trainer import restore_params

    changed = MERGED_OVERRIDES | {f"parallel.mesh.{axis}": "1" for axis in AXES}
    changed |= {"parallel.preset": "custom", "parallel.mesh.data": "-1"}  # a copy a device
    if any_batch:
        one_a_device = str(len(jax.devices()))
        changed |= {"data.batch_size": one_a_device, "eval.batch_size": one_a_device}
        changed |= {"train.microbatches": "1"}
    workdir = open_folder(args.workdir)
    experiment = build(load_config(workdir, changed | overrides), jax.devices())
    parameters, step = restore_params(experiment, workdir, args.average, args.best)
    return experiment, parameters, step


def only_cpu(overrides: Overrides) -> None:
    """For verbs that read what runs wrote, perhaps while these use the accelerator."""
    import jax

    if overrides:
        raise UserError(f"--config.{next(iter(overrides))}: this verb reads runs as they are")
    jax.config.update("jax_platforms", "cpu")
