"""Verbs that make runs: train, launch, sweep, merge, import, export."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from lm import config as configs
from lm.cli.arguments import Overrides
from lm.errors import UserError
from lm.storage import open_run_folder, resolve_path


def train(args: argparse.Namespace, overrides: Overrides) -> int:
    """Train a model, or continue the run in --workdir."""
    config = configs.load(args.config, overrides)
    from lm.training.monitor import RESUMABLE
    from lm.training.trainer import train

    return 0 if train(config, open_run_folder(args.workdir)) else RESUMABLE


def launch(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run a command as several processes on this host, and start them again when one dies."""
    from lm.tools.launching.supervise import RestartPolicy, launch

    if overrides:
        raise UserError("lm launch: --config.… goes after --, with the command")
    policy = RestartPolicy(args.restarts, args.backoff)
    return launch(args.command, args.processes, args.gpus, policy)


def sweep(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run, or continue, every run of a sweep file; --config.a.b=VALUE goes to every run."""
    from lm.sweeps.sweep import Search, load_sweep
    from lm.tools.launching.launchers import make_launcher
    from lm.tools.launching.run_sweep import dry_run, locked, run_sweep
    from lm.tools.launching.trials import Trials, run_search

    folder, words = resolve_path(args.workdir), tuple(args.command or ())
    if not isinstance(folder, Path):
        raise UserError("lm sweep: --workdir is a folder of this machine, or one that it mounts")
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
            runs = Trials(loaded, folder, overrides, words, stored=False).ask(parallel)
        dry_run(runs, launcher_of(), parallel)
        return 0
    with locked(folder) as lock:
        launcher = launcher_of(keep_open=(lock,))
        if isinstance(loaded, Search):
            trials = Trials(loaded, folder, overrides, words)
            return run_search(trials, launcher, parallel, args.retries)
        return run_sweep(loaded, runs, folder, launcher, parallel, args.retries)


def merge(args: argparse.Namespace, overrides: Overrides) -> int:
    """Write a run's parameters as a run of their own: low-rank updates merged, or an average."""
    from lm.parallel.hosts import print_on_primary_host
    from lm.runs.merged_run import merge_run

    merge_run(
        open_run_folder(args.workdir),
        open_run_folder(args.to),
        args.average,
        overrides,
        print_on_primary_host,
    )
    return 0


def import_model(args: argparse.Namespace, overrides: Overrides) -> int:
    """Make a run of a Hugging Face model folder, or of a .bin file of llama2.c."""
    from lm.interop.import_export import import_run
    from lm.parallel.hosts import print_on_primary_host

    import_run(Path(args.source), open_run_folder(args.workdir), overrides, print_on_primary_host)
    return 0


def export(args: argparse.Namespace, overrides: Overrides) -> int:
    """Write a run as a folder that Hugging Face's transformers loads, tokenizer included."""
    from lm.interop.import_export import export_run
    from lm.parallel.hosts import print_on_primary_host

    if overrides:
        raise UserError(f"lm export takes no --config.{next(iter(overrides))}")
    folders = open_run_folder(args.workdir), open_run_folder(args.to)
    export_run(*folders, args.average, args.best, args.dtype, print_on_primary_host)
    return 0
