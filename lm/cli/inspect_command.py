"""`lm inspect`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lm.cli.arguments import (
    Overrides,
    Parser,
    open_run,
    weights_arguments,
    workdir_argument,
)
from lm.cli.used_keys import MESH, MODEL, READING, Patterns
from lm.errors import UserError
from lm.storage import open_run_folder, storage_path


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    workdir_argument(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="prompt, or source of an encoder–decoder; repeatable",
    )
    target = "target of the source, or continuation of the prompt (default: generated)"
    parser.add_argument("--target", metavar="TEXT", help=target)
    parser.add_argument(
        "--input", metavar="FILE.jsonl", help='{"prompt": TEXT, "target": TEXT} per line'
    )
    corpus = "also show the most active neurons over this data (as data.source)"
    parser.add_argument("--corpus", metavar="SOURCE", help=corpus)
    output = "folder for index.html and text-N.npz (default: WORKDIR/inspect)"
    parser.add_argument("--output", metavar="DIR", help=output)
    weights_arguments(parser)


def used_keys(args: argparse.Namespace) -> Patterns:
    """Return patterns of the configuration keys that the command uses."""
    reading = (*READING, "eval.max_batches") if args.corpus else ("data.sequence_length",)
    return (*MESH, *MODEL, "decode.*", *reading)


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run the command; return the exit code."""
    from lm.data.splits import open_split
    from lm.evaluation.task import require_writable
    from lm.experiment import record_columns
    from lm.tools.reports.inspect_page import Text, read_texts, write_inspect_page

    if bool(args.prompt) == bool(args.input):
        raise UserError("lm inspect: give either --prompt TEXT or --input FILE.jsonl")
    if args.target is not None and len(args.prompt) != 1:
        raise UserError("--target belongs to a single --prompt; for several use --input FILE.jsonl")
    if args.corpus is not None and not args.corpus.strip():
        raise UserError("--corpus is empty; give NAME:ARGUMENT, such as text:FILE")
    texts = [Text(text, args.target) for text in args.prompt]
    texts = texts or read_texts(Path(args.input))
    folder = open_run_folder(args.workdir)
    output = Path(args.output or folder / "inspect")
    require_writable(output)
    if args.corpus is not None:
        overrides = {"eval.max_batches": "0", **overrides, "data.test_source": args.corpus}
    options = {"any_batch": args.corpus is None, "heads_optional": True}
    experiment, params, step = open_run(args, overrides, **options)
    corpus = None
    if args.corpus is not None:
        config, tokenizer = experiment.config, experiment.tokenizer
        stores = open_split(config.data, "test", tokenizer, record_columns(config), progress=True)
        corpus = experiment.evaluation_batches(stores)
    title = storage_path(folder).name
    page = write_inspect_page(experiment, params, step, texts, output, title, corpus)
    print(storage_path(page))
    return 0
