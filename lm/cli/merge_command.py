"""`lm merge`."""

from __future__ import annotations

import argparse

from lm.cli.arguments import (
    AVERAGE,
    Overrides,
    Parser,
    at_least,
    process_arguments,
    workdir_argument,
)
from lm.cli.used_keys import MESH, Patterns
from lm.storage import open_run_folder


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    workdir_argument(parser)
    parser.add_argument("--to", required=True, metavar="DIR", help="folder of the new run")
    parser.add_argument("--average", type=at_least(1), default=1, metavar="N", help=AVERAGE)
    process_arguments(parser)


def used_keys(args: argparse.Namespace) -> Patterns:
    """Return patterns of the configuration keys that the command uses."""
    return MESH


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run the command; return the exit code."""
    from lm.parallel.mesh import print_on_primary_host
    from lm.runs.saved_params import merge_run

    merge_run(
        open_run_folder(args.workdir),
        open_run_folder(args.to),
        args.average,
        overrides,
        print_on_primary_host,
    )
    return 0
