"""`lm report`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from lm.cli.arguments import (
    Overrides,
    Parser,
    only_cpu,
)
from lm.cli.used_keys import Patterns
from lm.errors import UserError
from lm.storage import open_run_folder, storage_path


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "--workdir", required=True, nargs="+", metavar="DIR", help="runs or folders of runs"
    )
    output = "folder for index.html and PNGs (default: WORKDIR/report, or next to several runs)"
    parser.add_argument("--output", metavar="DIR", help=output)


def used_keys(args: argparse.Namespace) -> Patterns:
    """Return patterns of the configuration keys that the command uses."""
    return ()


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run the command; return the exit code."""
    from lm.tools.reports.report_page import write_page

    only_cpu()
    workdirs = [open_run_folder(place) for place in dict.fromkeys(args.workdir)]
    print(storage_path(write_page(workdirs, _output(args, workdirs))))
    return 0


def _output(args: argparse.Namespace, workdirs: Sequence[Path]) -> Path:
    """Return --output, or folder `report` in the workdir or in the parent of all workdirs."""
    if args.output:
        return Path(args.output)
    if len(workdirs) == 1:
        return workdirs[0] / "report"
    if any("://" in place for place in args.workdir):
        raise UserError("lm report: give --output DIR for several folders of which one is a bucket")
    parents = [path.absolute().parent for path in workdirs]
    return Path(os.path.commonpath(parents)) / "report"
