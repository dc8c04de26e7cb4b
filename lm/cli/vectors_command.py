"""`lm vectors`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lm.cli.arguments import (
    Overrides,
    Parser,
    json_argument,
    open_run,
    print_result,
    weights_arguments,
)
from lm.cli.used_keys import MESH, Patterns
from lm.errors import UserError


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    parser.add_argument("--workdir", metavar="DIR", help="run with the words tokenizer")
    parser.add_argument(
        "--vectors",
        metavar="FILE",
        help="file of vectors instead, in GloVe's or word2vec's text format",
    )
    parser.add_argument(
        "--output", metavar="FILE.txt[.gz]", help="file to write, in GloVe's format"
    )
    parser.add_argument(
        "--similarity",
        action="append",
        default=[],
        metavar="FILE",
        help="word pairs with a score per line; repeatable",
    )
    parser.add_argument("--analogies", metavar="FILE", help="word2vec's questions-words.txt")
    weights_arguments(parser)
    json_argument(parser)


def used_keys(args: argparse.Namespace) -> Patterns:
    """Return patterns of the configuration keys that the command uses."""
    return MESH if args.workdir else ()


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run the command; return the exit code."""
    from lm.data.word_vectors import load_vectors, save_vectors
    from lm.evaluation.word_scores import score_word_vectors, trained_word_vectors

    if bool(args.workdir) == bool(args.vectors):
        raise UserError("lm vectors: give either --workdir DIR or --vectors FILE")
    if args.workdir:
        experiment, parameters, _ = open_run(args, overrides)
        found = trained_word_vectors(experiment.param_infos, parameters, experiment.tokenizer)
    else:
        found = load_vectors(args.vectors)
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        save_vectors(found, args.output)
    print_result(score_word_vectors(found, args.similarity, args.analogies), args.json)
    return 0
