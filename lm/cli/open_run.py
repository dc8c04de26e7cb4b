"""Opening the run that a verb is about."""

from __future__ import annotations

import argparse
from typing import Any

from lm.cli.arguments import Overrides
from lm.errors import UserError
from lm.storage import open_run_folder


def open_run(
    args: argparse.Namespace, overrides: Overrides, any_batch: bool = False
) -> tuple[Any, Any, int]:
    """Load the run that `--workdir`, `--average` and `--best` name; see `load_run`."""
    from lm.parallel.hosts import print_on_primary_host
    from lm.runs.saved_params import load_run

    workdir = open_run_folder(args.workdir)
    options = {"average": args.average, "best": args.best, "any_batch": any_batch}
    return load_run(workdir, overrides, print_on_primary_host, **options)


def only_cpu(overrides: Overrides) -> None:
    """For verbs that read what runs wrote, perhaps while these use the accelerator."""
    import jax

    if overrides:
        raise UserError(f"--config.{next(iter(overrides))}: this verb reads runs as they are")
    jax.config.update("jax_platforms", "cpu")
