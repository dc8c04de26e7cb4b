"""`lm inspect`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lm.cli.arguments import Overrides, Parser, open_run, weights_arguments
from lm.cli.used_keys import MESH, MODEL, Patterns
from lm.errors import UserError
from lm.storage import open_run_folder, storage_path


def add_arguments(parser: Parser) -> None:
    """Add the verb's options."""
    parser.add_argument("--workdir", required=True, metavar="DIR")
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="text or source; repeatable"
    )
    target = "target of the source, or the continuation of the prompt; without, searched for"
    parser.add_argument("--target", metavar="TEXT", help=target)
    parser.add_argument(
        "--input", metavar="FILE.jsonl", help='{"prompt": TEXT, "target": TEXT} a line'
    )
    output = "for index.html and text-N.npz; WORKDIR/inspect"
    parser.add_argument("--output", metavar="DIR", help=output)
    weights_arguments(parser)


def used_keys(args: argparse.Namespace) -> Patterns:
    """Return patterns of the configuration keys that the verb uses."""
    return (*MESH, *MODEL, "decode.*", "data.sequence_length")


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run the verb; return the exit code."""
    from lm.evaluation.task import require_writable
    from lm.tools.reports.inspect_page import Text, read_texts, write_inspect_page

    if bool(args.prompt) == bool(args.input):
        raise UserError("lm inspect: give either --prompt TEXT or --input FILE.jsonl")
    if args.target is not None and len(args.prompt) != 1:
        raise UserError("--target is that of one --prompt; give several as an --input FILE.jsonl")
    texts = [Text(text, args.target) for text in args.prompt]
    texts = texts or read_texts(Path(args.input))
    folder = open_run_folder(args.workdir)
    output = Path(args.output or folder / "inspect")
    require_writable(output)
    experiment, params, step = open_run(args, overrides, any_batch=True)
    title = storage_path(folder).name
    print(storage_path(write_inspect_page(experiment, params, step, texts, output, title)))
    return 0
