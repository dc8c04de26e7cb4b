"""`lm score`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lm.cli.arguments import (
    Overrides,
    Parser,
    at_least,
    open_run,
    process_arguments,
    weights_arguments,
    workdir_argument,
)
from lm.cli.used_keys import MESH, MODEL, READING, Patterns
from lm.errors import UserError


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    workdir_argument(parser)
    parser.add_argument(
        "--input",
        metavar="FILE.jsonl",
        help='{"prompt": TEXT, "continuations": [TEXT, …]} per line; without a prompt, whole texts',
    )
    parser.add_argument(
        "--output", metavar="FILE.jsonl", help="output (default: stdout); continued if it exists"
    )
    parser.add_argument(
        "--top_logits",
        type=at_least(1),
        metavar="K",
        help="instead, write the log-probabilities of the K most likely tokens at every position "
        "of the training data to the folder --output, for --config.objective.teacher_logits",
    )
    weights_arguments(parser)
    process_arguments(parser)


def used_keys(args: argparse.Namespace) -> Patterns:
    """Return patterns of the configuration keys that the command uses."""
    if args.top_logits:
        return (*MESH, *MODEL, *READING, "data.source", "data.validation_*", "-objective.*")
    return (*MESH, *MODEL, "data.sequence_length")


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run the command; return the exit code."""
    from lm.decoding.generate_file import weights_identity
    from lm.evaluation.score_file import score_file

    if bool(args.input) == bool(args.top_logits):
        raise UserError("give --input FILE.jsonl, or --top_logits K with the folder --output")
    if args.top_logits and not args.output:
        raise UserError("--top_logits needs the folder --output")
    experiment, params, step = open_run(args, overrides)
    if args.top_logits:
        from lm.evaluation.top_logits import write_top_logits
        from lm.parallel.mesh import print_on_primary_host

        made_by, folder = weights_identity(params, step), Path(args.output)
        for line in write_top_logits(experiment, params, args.top_logits, folder, made_by):
            print_on_primary_host(line)
        return 0
    files = Path(args.input), Path(args.output) if args.output else None
    made_by = weights_identity(params, step)
    score_file(experiment, params, experiment.tokenizer, *files, made_by)
    return 0
