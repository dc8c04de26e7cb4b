"""`lm export`."""

from __future__ import annotations

import argparse

from lm.cli.arguments import (
    Overrides,
    Parser,
    weights_arguments,
)
from lm.cli.used_keys import Patterns
from lm.storage import open_run_folder


def add_arguments(parser: Parser) -> None:
    """Add the verb's options."""
    parser.add_argument("--workdir", required=True, metavar="DIR")
    parser.add_argument("--to", required=True, metavar="DIR")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    weights_arguments(parser)


def used_keys(args: argparse.Namespace) -> Patterns:
    """Return patterns of the configuration keys that the verb uses."""
    return ()


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run the verb; return the exit code."""
    from lm.interop.import_export import export_run
    from lm.parallel.mesh import print_on_primary_host

    folders = open_run_folder(args.workdir), open_run_folder(args.to)
    export_run(*folders, args.average, args.best, args.dtype, print_on_primary_host)
    return 0
