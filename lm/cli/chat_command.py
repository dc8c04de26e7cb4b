"""`lm chat`."""

from __future__ import annotations

import argparse
import sys

from lm.cli.arguments import (
    Overrides,
    Parser,
    check_texts,
    open_run,
    sampling_arguments,
    weights_arguments,
    workdir_argument,
)
from lm.cli.used_keys import MODEL, Patterns
from lm.errors import UserError


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    workdir_argument(parser)
    parser.add_argument("--system", default="", metavar="TEXT", help="system prompt")
    sampling_arguments(parser)
    weights_arguments(parser)


def used_keys(args: argparse.Namespace) -> Patterns:
    """Return patterns of the configuration keys that the command uses."""
    unused = "-decode.beam_size", "-decode.length_penalty"
    return ("parallel.*", *MODEL, "decode.*", *unused, "data.sequence_length")


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run the command; return the exit code."""
    from lm.cli.chat_terminal import Terminal
    from lm.decoding.chat_session import ChatSession
    from lm.decoding.chats import chat_template
    from lm.decoding.sampling import Sampling
    from lm.decoding.weights import prepare

    check_texts([*args.stop, args.system])
    if "" in args.stop:
        raise UserError("--stop is empty: every answer would be empty")
    if args.max_new_tokens is not None:
        overrides = overrides | {"decode.max_length": str(args.max_new_tokens)}
    experiment, params, _ = open_run(args, overrides, any_batch=True)
    template = chat_template(experiment)
    sampling = Sampling(0.0 if args.greedy else args.temperature, args.top_k, args.top_p)
    session = ChatSession(
        *prepare(experiment, params), template, sampling, args.seed, args.stop, args.system
    )
    Terminal(session, sys.stdin.isatty() and sys.stdout.isatty(), sys.stdout).run()
    return 0
