"""`lm train`."""

from __future__ import annotations

import argparse

from lm import config as configs
from lm.cli.arguments import (
    Overrides,
    Parser,
    compiler_arguments,
    config_argument,
    process_arguments,
    workdir_argument,
)
from lm.cli.used_keys import ALL, Patterns, print_without_effect
from lm.config.registries import SCHEMA


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    config_argument(parser)
    workdir_argument(parser)
    parser.add_argument(
        "--restart",
        action="store_true",
        help="start over if no checkpoint is readable; the old run moves to restarted.N",
    )
    parser.add_argument(
        "--change",
        action="store_true",
        help="continue with changed settings (learning rate, schedule, steps, batch size …)",
    )
    parser.add_argument(
        "--fork",
        metavar="RUN[@STEP]",
        help="start from the parameters, optimizer state, data position and step of another run",
    )
    compiler_arguments(parser)
    process_arguments(parser)


def used_keys(args: argparse.Namespace) -> Patterns:
    """Return patterns of the configuration keys that the command uses."""
    return ALL


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run the command; return the exit code."""
    from lm.training.monitor import RESUMABLE
    from lm.training.stop_signals import stop_requests

    with stop_requests(exits=True) as stop:
        config = configs.load_config(args.config, overrides)
        from lm.parallel.mesh import print_on_primary_host
        from lm.training.trainer import train

        if config.model.family != "decoder" or any(SCHEMA[path].needs for path in overrides):
            print_without_effect(config, overrides, print_on_primary_host)
        finished = train(
            config,
            args.workdir,
            log=print_on_primary_host,
            progress=True,
            restart=args.restart,
            change=args.change,
            fork=args.fork,
            stop=stop,
        )
    return 0 if finished else RESUMABLE
