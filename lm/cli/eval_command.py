"""`lm eval`."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from lm.cli.arguments import (
    Overrides,
    Parser,
    json_argument,
    open_run,
    print_result,
    process_arguments,
    weights_arguments,
)
from lm.errors import UserError
from lm.storage import open_run_folder, storage_path


def add_arguments(parser: Parser) -> None:
    """Add the verb's options."""
    parser.add_argument("--workdir", required=True, metavar="DIR")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--task", action="store_true", help="scores and predictions of a task")
    parser.add_argument("--output", metavar="DIR", help="for --task; WORKDIR/eval/SPLIT-STEP")
    weights_arguments(parser)
    json_argument(parser)
    process_arguments(parser)


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run the verb; return the exit code."""
    from tqdm import tqdm

    from lm.data.dataset import open_split
    from lm.evaluation.loss import evaluate_loss
    from lm.evaluation.task import check_task
    from lm.experiment import reads_records

    if "data.tokenizer" in overrides:
        raise UserError("--config.data.tokenizer: a run is evaluated with its own tokenizer")
    if args.output and not args.task:
        raise UserError("--output is where --task writes its report: give both")
    experiment, params, step = open_run(args, overrides)
    if args.task:
        check_task(experiment)
    config, tokenizer = experiment.config, experiment.tokenizer
    stores = open_split(config.data, args.split, tokenizer, reads_records(config), progress=True)
    if args.task:
        return _evaluate_task(args, experiment, params, step, stores)
    batches = experiment.evaluation_batches(stores)
    track = partial(tqdm, desc="evaluating", file=sys.stderr)
    result = evaluate_loss(experiment, params, batches, stores, track=track)
    report = {"step": step, **{f"eval/{args.split}/{k}": v for k, v in result.items()}}
    print_result(report, args.json)
    return 0


def _evaluate_task(
    args: argparse.Namespace, experiment: Any, params: Any, step: int, *of: Any
) -> int:
    from lm.evaluation.task import evaluate_task, require_writable, write_task_report
    from lm.parallel.mesh import is_primary_host

    folder = Path(args.output or open_run_folder(args.workdir) / "eval" / f"{args.split}-{step}")
    require_writable(folder)
    report, rows = evaluate_task(experiment, params, *of)
    report = {"step": step, "split": args.split, **report}
    if is_primary_host():
        write_task_report(folder, report, rows)
        print_result(report, args.json)
        print(f"report and predictions are in {storage_path(folder)}", file=sys.stderr)
    return 0
