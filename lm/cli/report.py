"""Verbs about runs that are done: report, scaling."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lm.cli.arguments import Overrides
from lm.cli.open_run import only_cpu
from lm.errors import UserError
from lm.storage import open_run_folder, storage_path


def report(args: argparse.Namespace, overrides: Overrides) -> int:
    """Write a page and pictures of a run, or of all runs in a folder."""
    from lm.tools.reports.report_page import write_page

    only_cpu(overrides)
    workdir = open_run_folder(args.workdir)
    print(storage_path(write_page(workdir, Path(args.output or workdir / "report"))))
    return 0


def scaling(args: argparse.Namespace, overrides: Overrides) -> int:
    """Fit a scaling law to runs: its optimum and forecast for a budget, with intervals."""
    from lm.tools.reports.scaling_runs import runs_of_folder, runs_of_table
    from lm.tools.reports.scaling_study import enough_tokens, study, study_text

    only_cpu(overrides)
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
        left_out.append(f"{few} tokens a parameter (--min_tokens_per_parameter)")
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    output = Path(folder) if folder else None
    found = study(runs, args.budget, args.resamples, args.seed, output)
    print(json.dumps(found) if args.json else study_text(found))
    if output:
        print(f"pictures are in {storage_path(output)}", file=sys.stderr)
    return 0
