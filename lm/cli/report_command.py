"""`lm report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lm.cli.arguments import (
    Overrides,
    Parser,
    only_cpu,
)
from lm.storage import open_run_folder, storage_path


def add_arguments(parser: Parser) -> None:
    """Add the verb's options."""
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="a run, or a folder of runs"
    )
    parser.add_argument("--output", metavar="DIR", help="for index.html and PNGs; WORKDIR/report")


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run the verb; return the exit code."""
    from lm.tools.reports.report_page import write_page

    only_cpu(overrides)
    workdir = open_run_folder(args.workdir)
    print(storage_path(write_page(workdir, Path(args.output or workdir / "report"))))
    return 0
