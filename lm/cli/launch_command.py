"""`lm launch`."""

from __future__ import annotations

import argparse

from lm.cli.arguments import (
    Overrides,
    Parser,
    at_least,
)
from lm.cli.used_keys import ALL, Patterns
from lm.errors import UserError


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    parser.usage = "lm launch --processes N [OPTIONS] -- train …"
    parser.add_argument(
        "--processes", type=at_least(1), required=True, metavar="N", help="processes to start"
    )
    parser.add_argument(
        "--gpus", type=at_least(0), default=0, metavar="G", help="GPUs to divide among them"
    )
    parser.add_argument(
        "--restarts",
        type=at_least(0),
        default=10,
        metavar="N",
        help="give up after N restarts without a new checkpoint",
    )
    parser.add_argument(
        "--backoff",
        type=at_least(0.0),
        default=1.0,
        metavar="S",
        help="seconds before the first restart; doubles each time",
    )


def used_keys(args: argparse.Namespace) -> Patterns:
    """Return patterns of the configuration keys that the command uses."""
    return ALL  # refused by `run`: they belong after --


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run the command; return the exit code."""
    from lm.tools.launching.supervise import RestartPolicy, launch

    if overrides:
        raise UserError("lm launch: --config.… goes after --, with the command")
    policy = RestartPolicy(args.restarts, args.backoff)
    return launch(args.command, args.processes, args.gpus, policy)
