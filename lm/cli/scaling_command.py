"""`lm scaling`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lm.cli.arguments import (
    Overrides,
    Parser,
    at_least,
    json_argument,
    only_cpu,
    positive,
)
from lm.cli.used_keys import Patterns
from lm.errors import UserError
from lm.storage import open_run_folder, storage_path


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    parser.add_argument("--workdir", metavar="DIR", help="folder of finished runs")
    parser.add_argument(
        "--runs",
        metavar="FILE.csv",
        help="table of runs instead, with columns Model Size, Training FLOP, loss",
    )
    parser.add_argument(
        "--budget",
        type=positive,
        action="append",
        default=[],
        metavar="FLOPS",
        help="compute budget to predict the best model for; repeatable",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder for plots (default: WORKDIR/scaling; with --runs, no plots)",
    )
    parser.add_argument(
        "--min_tokens_per_parameter",
        type=at_least(0.0),
        default=0.45,
        metavar="X",
        help="leave out runs with fewer tokens per parameter (still near their initial loss)",
    )
    parser.add_argument(
        "--resamples", type=at_least(20), default=1000, metavar="N", help="bootstrap samples"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="random seed of the bootstrap")
    json_argument(parser)


def used_keys(args: argparse.Namespace) -> Patterns:
    """Return patterns of the configuration keys that the command uses."""
    return ()


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run the command; return the exit code."""
    from lm.tools.reports.scaling_law import runs_of_folder, runs_of_table
    from lm.tools.reports.scaling_study import enough_tokens, study, study_text

    only_cpu()
    if bool(args.workdir) == bool(args.runs):
        raise UserError("lm scaling: give either --workdir DIR or --runs FILE.csv")
    left_out: list[str] = []
    if args.runs:
        all_runs, folder = runs_of_table(Path(args.runs)), args.output
    else:
        all_runs, left_out = runs_of_folder(open_run_folder(args.workdir))
        folder = args.output or open_run_folder(args.workdir) / "scaling"
    runs = enough_tokens(all_runs, args.min_tokens_per_parameter)
    if len(runs) < len(all_runs):
        few = f"{len(all_runs) - len(runs)} runs of fewer than {args.min_tokens_per_parameter}"
        left_out.append(f"{few} tokens per parameter (--min_tokens_per_parameter)")
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    output = Path(folder) if folder else None
    found = study(runs, args.budget, args.resamples, args.seed, output)
    print(json.dumps(found) if args.json else study_text(found))
    if output:
        print(f"pictures are in {storage_path(output)}", file=sys.stderr)
    return 0
