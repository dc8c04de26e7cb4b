"""`lm compare`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lm.cli.arguments import (
    Overrides,
    Parser,
    at_least,
    json_argument,
    only_cpu,
    open_run,
    print_result,
    probability,
    weights_arguments,
)
from lm.cli.used_keys import MODEL, Patterns
from lm.errors import UserError
from lm.storage import storage_path


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    parser.add_argument("--workdir", nargs="+", metavar="DIR", help="the two runs")
    parser.add_argument(
        "--prompts", metavar="FILE", help="file of prompts or sources, one per line, or .jsonl"
    )
    output = "folder for the page (index.html) and the names of the runs (key.json)"
    parser.add_argument("--output", required=True, metavar="DIR", help=output)
    answers = "files downloaded from the page: print the win rate"
    parser.add_argument("--answers", nargs="+", metavar="FILE", help=answers)
    parser.add_argument(
        "--max_new_tokens", type=at_least(1), metavar="N", help="same as --config.decode.max_length"
    )
    for name, kind, default, metavar, about in (
        ("temperature", at_least(0.0), 0.8, "T", "sampling temperature"),
        ("top_p", probability, 1.0, "P", "nucleus sampling"),
        ("seed", at_least(0), 0, "N", "random seed of samples and their order"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, metavar=metavar, help=about)
    weights_arguments(parser)
    json_argument(parser)


def used_keys(args: argparse.Namespace) -> Patterns:
    """Return patterns of the configuration keys that the command uses."""
    return () if args.answers else ("parallel.*", *MODEL, "decode.*", "data.sequence_length")


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run the command; return the exit code."""
    from lm.tools.reports.compare_page import win_rate

    if args.answers:
        if args.workdir or args.prompts:
            raise UserError("--answers are for an existing page: omit --workdir and --prompts")
        only_cpu()
        files = [Path(file) for file in args.answers]
        if len({file.resolve() for file in files}) < len(files):
            raise UserError("--answers: a file is given twice")
        print_result(win_rate(Path(args.output), files), args.json)
        return 0
    if len(args.workdir or ()) != 2 or not args.prompts:
        raise UserError("lm compare: give --workdir A B and --prompts FILE, or --answers FILE")
    _write_page(args, overrides)
    return 0


def _write_page(args: argparse.Namespace, overrides: Overrides) -> None:
    """Generate a text for each prompt with both runs, and write the page."""
    from lm.decoding.generate_file import read_inputs
    from lm.evaluation.task import require_writable
    from lm.tools.html_pages import page_template
    from lm.tools.reports.compare_page import TEMPLATE, write_compare_page

    page_template(TEMPLATE)  # raises UserError without its package, before generating texts
    folder, prompts = Path(args.output), read_inputs(Path(args.prompts), "prompt", "")
    prompts = [prompt for prompt in prompts if prompt.strip()]
    if not prompts:
        raise UserError(f"{args.prompts} has no prompts")
    require_writable(folder)
    if (folder / "key.json").exists():
        raise UserError(
            f"{folder} already has a page, and answers may refer to it: use another --output"
        )
    if args.max_new_tokens is not None:
        overrides = overrides | {"decode.max_length": str(args.max_new_tokens)}
    runs, texts = [], []
    for workdir in args.workdir:
        written, step = _texts(args, workdir, prompts, overrides)
        runs.append(f"{workdir}@{step}")
        texts.append(written)
    page = write_compare_page(folder, runs, prompts, (texts[0], texts[1]), args.seed)
    print(storage_path(page))


def _texts(
    args: argparse.Namespace, workdir: str, prompts: Any, overrides: Overrides
) -> tuple[list[str], int]:
    """Return the text that a run generates for each prompt, and its step."""
    from lm.decoding.generation import generate_texts
    from lm.decoding.prompts import is_encoder_decoder, require_text_output
    from lm.decoding.sampling import Sampling
    from lm.progress import progress_bar

    one = argparse.Namespace(**vars(args) | {"workdir": workdir})
    experiment, params, step = open_run(one, overrides, any_batch=True)
    config, model = experiment.config, experiment.model
    require_text_output(experiment)
    searches = is_encoder_decoder(model) or config.decode.beam_size > 1
    sampling = None if searches else Sampling(args.temperature, top_p=args.top_p)
    with progress_bar(workdir, len(prompts)) as bar:
        found = generate_texts(
            experiment, params, experiment.tokenizer, prompts, sampling, args.seed, 0, bar.update
        )
        return [generations[0].text if generations else "" for generations in found], step
