"""`lm import`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lm.cli.arguments import (
    Overrides,
    Parser,
    process_arguments,
    workdir_argument,
)
from lm.cli.used_keys import ALL, Patterns
from lm.storage import open_run_folder

# Keys of the model that do not depend on its weights.
_ARCHITECTURE_FREE = ("model.dtype", "model.attention", "model.*dropout", "model.router_jitter")


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "--from", dest="source", required=True, metavar="DIR", help="model folder, or .bin file"
    )
    workdir_argument(parser, "new folder for the run")
    process_arguments(parser)


def used_keys(args: argparse.Namespace) -> Patterns:
    """Return patterns of the configuration keys that the command uses."""
    return (*ALL, "-model.*", *_ARCHITECTURE_FREE)


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run the command; return the exit code."""
    from lm.interop.import_export import import_run
    from lm.parallel.mesh import print_on_primary_host

    import_run(Path(args.source), open_run_folder(args.workdir), overrides, print_on_primary_host)
    return 0
