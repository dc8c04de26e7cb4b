"""`lm score`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lm.cli.arguments import Overrides, Parser, open_run, process_arguments, weights_arguments
from lm.cli.used_keys import MESH, MODEL, Patterns


def add_arguments(parser: Parser) -> None:
    """Add the verb's options."""
    parser.add_argument("--workdir", required=True, metavar="DIR")
    parser.add_argument(
        "--input",
        required=True,
        metavar="FILE.jsonl",
        help='{"prompt": TEXT, "continuations": [TEXT, …]} a line; without a prompt whole texts',
    )
    parser.add_argument("--output", metavar="FILE.jsonl", help="continued; without, stdout")
    weights_arguments(parser)
    process_arguments(parser)


def used_keys(args: argparse.Namespace) -> Patterns:
    """Return patterns of the configuration keys that the verb uses."""
    return (*MESH, *MODEL, "data.sequence_length")


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run the verb; return the exit code."""
    from lm.decoding.generate_file import weights_identity
    from lm.evaluation.score_file import score_file

    experiment, params, step = open_run(args, overrides)
    files = Path(args.input), Path(args.output) if args.output else None
    made_by = weights_identity(params, step)
    score_file(experiment, params, experiment.tokenizer, *files, made_by)
    return 0
