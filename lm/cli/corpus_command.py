"""`lm corpus`."""

from __future__ import annotations

import argparse
import inspect
import sys

from lm.cli.arguments import (
    Overrides,
    Parser,
    at_least,
)
from lm.cli.used_keys import Patterns
from lm.errors import UserError, missing_package


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    parser.add_argument("--config", metavar="FILE.py[:VARIANT]", help="sources and rules")
    parser.add_argument(
        "--output", metavar="DIR", help="folder or bucket URL for shards and data card"
    )
    where = "where the tasks run"
    parser.add_argument(
        "--executor", choices=("local", "slurm", "ray"), default="local", help=where
    )
    workers = "concurrent tasks (default: one per core, or as many as the cluster allows)"
    parser.add_argument("--workers", type=at_least(1), default=0, metavar="N", help=workers)
    parser.add_argument("--rules", action="store_true", help="list every rule and its options")


def used_keys(args: argparse.Namespace) -> Patterns:
    """Return patterns of the configuration keys that the command uses: its own configuration's."""
    return ("*",)


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run the command; return the exit code."""
    try:
        from lm.tools.corpus.corpus_config import load_corpus_config
        from lm.tools.corpus.corpus_rules import RULES
        from lm.tools.corpus.corpus_run import make_corpus
    except ImportError as error:
        raise missing_package("lm corpus", error.name or "datatrove", "corpus") from error
    if args.rules:
        for name, rule in RULES.items():
            print(f"{name}: {rule.about}")
            for option, parameter in rule.options.items():
                needed = parameter.default is inspect.Parameter.empty
                print(f"    {option}" if needed else f"    {option} = {parameter.default!r}")
        return 0
    if not args.config or not args.output:
        raise UserError("lm corpus: give --config FILE.py and --output PLACE, or --rules")
    config = load_corpus_config(args.config, overrides)
    page = make_corpus(config, args.output, args.executor, args.workers, _log)
    if page:
        print(page)
    return 0


def _log(line: str) -> None:
    print(line, file=sys.stderr)
