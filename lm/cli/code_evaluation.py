"""`lm eval --code`: options, and the evaluation on problems of programming."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm.cli.arguments import Overrides, Parser, at_least, open_run, print_result, probability
from lm.errors import UserError

OPTIONS = ("samples", "n_samples", "k", "temperature", "top_p", "seed", "time_limit", "workers")


def add_code_arguments(parser: Parser) -> None:
    """Add --code and its options."""
    parser.add_argument(
        "--code", metavar="FILE", help="pass@k on HumanEval or MBPP instead; programs are sandboxed"
    )
    of_code = "of --code: "
    parser.add_argument(
        "--samples", metavar="FILE", help=of_code + "completions that are given, .jsonl; no run"
    )
    for name, kind, metavar, about in (
        ("n_samples", at_least(1), "N", "samples of each problem (1)"),
        ("k", _numbers, "K[,K…]", "of pass@k (1,10,100 as far as there are samples)"),
        ("temperature", at_least(0.0), "T", "of sampling (0; several samples: 0.8)"),
        ("top_p", probability, "P", "of sampling (0.95)"),
        ("seed", at_least(0), "SEED", "of sampling (0)"),
        ("time_limit", at_least(1), "S", "seconds of the processor a program has (5)"),
        ("workers", at_least(1), "N", "programs that run at a time (one a core)"),
    ):
        parser.add_argument(f"--{name}", type=kind, metavar=metavar, help=of_code + about)


def _numbers(text: str) -> list[int]:
    values = text.split(",")
    if not all(value.isdecimal() and int(value) for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers, such as 1,10")
    return [int(value) for value in values]


def evaluate_code(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run completions against the tests of problems, and write the records; return the exit code.

    They are of a run, or of the file of --samples.
    """
    from lm.evaluation.code.pass_rates import chosen_k, code_figures, run_samples
    from lm.evaluation.code.problems import read_completions, read_problems
    from lm.evaluation.code.sandbox import Limits, available_layers
    from lm.evaluation.task import require_writable, write_task_report
    from lm.parallel.mesh import is_primary_host
    from lm.progress import progress_bar
    from lm.runs.metrics_file import record_figures
    from lm.storage import open_run_folder, storage_path

    if len(args.step or ()) > 1:
        raise UserError("--code evaluates one checkpoint: give one --step")
    file = Path(args.code)
    problems = read_problems(file)[: args.limit]
    name = file.name.split(".")[0]
    if args.samples:
        for option in ("n_samples", "temperature", "top_p", "seed"):
            if getattr(args, option) is not None:
                raise UserError(f"--{option} is of samples that a run writes: give no --samples")
        samples = read_completions(Path(args.samples), problems)
        made_by: dict[str, Any] = {"samples": args.samples}
        folder = Path(args.output or f"{args.samples}-results")
    else:
        available_layers()
        samples, step = _written(args, overrides, problems)
        made_by = {"step": step}
        folder = Path(args.output or open_run_folder(args.workdir) / "eval" / f"{name}-{step}")
    values = chosen_k(samples, args.k or ())
    require_writable(folder)
    if not is_primary_host():
        return 0
    limits = Limits(seconds=args.time_limit or Limits.seconds)
    workers = args.workers or len(os.sched_getaffinity(0))
    with progress_bar("running programs", len(samples), unit="program") as bar:
        records = run_samples(samples, limits, workers, bar.update)
    figures = {f"eval/code/{name}/{k}": x for k, x in code_figures(records, values).items()}
    attempted = len({sample.problem.task_id for sample in samples})
    report = made_by | {"problems": attempted, "programs": len(samples), **figures}
    write_task_report(folder, report, records)
    if attempted < len(problems):
        print(f"note: {attempted} of {len(problems)} problems have samples", file=sys.stderr)
    if not args.samples and args.average == 1:
        record_figures(args.workdir, step, figures)
    print(f"report and samples are in {storage_path(folder)}", file=sys.stderr)
    print_result(report, args.json)
    return 0


def _written(
    args: argparse.Namespace, overrides: Overrides, problems: Sequence[Any]
) -> tuple[list[Any], int]:
    """Return samples that a run writes, and its step."""
    from lm.decoding.chats import chat_template
    from lm.decoding.prompts import is_encoder_decoder
    from lm.decoding.sampling import Sampling
    from lm.evaluation.code.completions import write_completions
    from lm.parallel.mesh import is_primary_host
    from lm.progress import progress_bar

    experiment, params, step = open_run(
        args, overrides, any_batch=True, step=(args.step or [None])[0]
    )
    model, tokenizer = experiment.model, experiment.tokenizer
    if not hasattr(model, "decode") or is_encoder_decoder(model):
        raise UserError(f"a model of the family {experiment.config.model.family} writes no code")
    template = chat_template(tokenizer, model) if args.apply_chat_template else None
    n_samples = args.n_samples or 1
    several = 0.0 if n_samples == 1 else 0.8
    temperature = several if args.temperature is None else args.temperature
    sampling = Sampling(temperature, top_p=args.top_p or 0.95)
    total = len(problems) * n_samples
    with progress_bar("writing programs", total, shown=is_primary_host(), unit="program") as bar:
        samples = write_completions(
            *(experiment, params, tokenizer, problems, n_samples),
            *(sampling, args.seed or 0, template, bar.update),
        )
    return samples, step
