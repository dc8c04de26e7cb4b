"""`lm train`."""

from __future__ import annotations

import argparse

from lm import config as configs
from lm.cli.arguments import (
    Overrides,
    Parser,
    config_argument,
    process_arguments,
    xla_flags_argument,
)
from lm.storage import open_run_folder


def add_arguments(parser: Parser) -> None:
    """Add the verb's options."""
    config_argument(parser)
    parser.add_argument("--workdir", required=True, metavar="DIR")
    xla_flags_argument(parser)
    process_arguments(parser)


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run the verb; return the exit code."""
    config = configs.load(args.config, overrides)
    from lm.training.monitor import RESUMABLE
    from lm.training.trainer import train

    return 0 if train(config, open_run_folder(args.workdir)) else RESUMABLE
