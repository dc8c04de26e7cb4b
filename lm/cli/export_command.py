"""`lm export`."""

from __future__ import annotations

import argparse

from lm.cli.arguments import (
    Overrides,
    Parser,
    weights_arguments,
)
from lm.errors import UserError
from lm.storage import open_run_folder


def add_arguments(parser: Parser) -> None:
    """Add the verb's options."""
    parser.add_argument("--workdir", required=True, metavar="DIR")
    parser.add_argument("--to", required=True, metavar="DIR")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    weights_arguments(parser)


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run the verb; return the exit code."""
    from lm.interop.import_export import export_run
    from lm.parallel.mesh import print_on_primary_host

    if overrides:
        raise UserError(f"lm export takes no --config.{next(iter(overrides))}")
    folders = open_run_folder(args.workdir), open_run_folder(args.to)
    export_run(*folders, args.average, args.best, args.dtype, print_on_primary_host)
    return 0
