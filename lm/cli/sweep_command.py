"""`lm sweep`."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from lm.cli.arguments import (
    Overrides,
    Parser,
    at_least,
    workdir_argument,
)
from lm.cli.used_keys import ALL, Patterns
from lm.errors import UserError
from lm.storage import resolve_path


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    parser.usage = "lm sweep --config SWEEP.py[:VARIANT] --workdir DIR [OPTIONS] [-- TRAIN OPTIONS]"
    parser.add_argument("--config", required=True, metavar="SWEEP.py[:VARIANT]", help="sweep file")
    workdir_argument(parser, "folder for the runs")
    where = "where the runs are started"
    parser.add_argument(
        "--launcher", choices=("local", "slurm", "tpu"), default="local", help=where
    )
    parser.add_argument(
        "--launcher_options",
        default="",
        metavar="TEXT",
        help="options for sbatch, or for tpu/train.sh",
    )
    parser.add_argument(
        "--parallel",
        type=at_least(1),
        metavar="N",
        help="concurrent runs (default: 1; with slurm, all)",
    )
    parser.add_argument(
        "--gpus",
        type=at_least(0),
        default=0,
        metavar="G",
        help="GPUs to divide among concurrent runs",
    )
    parser.add_argument(
        "--retries",
        type=at_least(0),
        default=2,
        metavar="N",
        help="attempts to repeat a failed run",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="only print every run and its command"
    )


def used_keys(args: argparse.Namespace) -> Patterns:
    """Return patterns of the configuration keys that the command uses."""
    return ALL


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run the command; return the exit code."""
    from lm.sweeps.sweep import Search, load_sweep
    from lm.tools.launching.launchers import make_launcher
    from lm.tools.launching.run_sweep import Trials, dry_run, locked, run_search, run_sweep

    folder, words = resolve_path(args.workdir), tuple(args.command or ())
    if not isinstance(folder, Path):
        raise UserError("lm sweep: --workdir must be a local or mounted folder")
    loaded, runs = load_sweep(args.config, folder, overrides, words)
    parallel = args.parallel or (max(1, len(runs)) if args.launcher == "slurm" else 1)
    launcher_of = partial(
        make_launcher,
        args.launcher,
        parallel=parallel,
        n_gpus=args.gpus,
        options=args.launcher_options,
    )
    if args.dry_run:
        if isinstance(loaded, Search):
            trials = Trials(loaded, folder, overrides, words, stored=False)
            runs = trials.ask(parallel)
            for status in trials.rejected:
                print(f"{status.run.name}: {status.reason}", file=sys.stderr)
        dry_run(runs, launcher_of(), parallel)
        return 0
    with locked(folder) as lock:
        launcher = launcher_of(keep_open=(lock,))
        if isinstance(loaded, Search):
            trials = Trials(loaded, folder, overrides, words)
            return run_search(trials, launcher, parallel, args.retries)
        return run_sweep(loaded, runs, folder, launcher, parallel, args.retries)
