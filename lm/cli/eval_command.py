"""`lm eval`."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from lm.cli.arguments import (
    Overrides,
    Parser,
    at_least,
    json_argument,
    open_run,
    print_result,
    process_arguments,
    weights_arguments,
)
from lm.cli.code_evaluation import OPTIONS as CODE_OPTIONS
from lm.cli.code_evaluation import add_code_arguments, evaluate_code
from lm.cli.used_keys import MESH, MODEL, READING, Patterns
from lm.config.registries import SAFETY_SETS
from lm.errors import UserError
from lm.storage import is_step, open_run_folder, storage_path
from lm.storage.folder_names import short_name


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    parser.add_argument("--workdir", metavar="DIR", help="folder or bucket URL of the run")
    split = "split to evaluate (default: validation)"
    parser.add_argument("--split", choices=("validation", "test"), help=split)
    parser.add_argument(
        "--source", metavar="SOURCE", help="data to evaluate on instead, in the form of data.source"
    )
    parser.add_argument(
        "--step",
        type=_steps,
        metavar="K[,K…]",
        help="checkpoints to evaluate (default: the newest)",
    )
    parser.add_argument(
        "--task", action="store_true", help="generate an answer for every record and score it"
    )
    parser.add_argument(
        "--harness", metavar="TASK[,TASK…]", help="run tasks of lm-eval, by name or YAML file"
    )
    parser.add_argument(
        "--shots", type=at_least(0), metavar="K", help="--harness: few-shot examples"
    )
    parser.add_argument(
        "--limit",
        type=at_least(1),
        metavar="N",
        help="--harness, --code: use the first N documents or problems",
    )
    parser.add_argument(
        "--include_path", metavar="DIR", help="--harness: folder of further task files"
    )
    chat = "--harness, --code: render prompts with the chat template"
    parser.add_argument("--apply_chat_template", action="store_true", help=chat)
    parser.add_argument(
        "--safety",
        nargs="?",
        const="",
        metavar="SET[,SET…]",
        help=f"run safety sets, without a value all applicable ones: {', '.join(SAFETY_SETS)}",
    )
    add_code_arguments(parser)
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder for results (default: in WORKDIR/eval)",
    )
    weights_arguments(parser)
    json_argument(parser)
    process_arguments(parser)


_OF_HARNESS = ("shots", "limit", "include_path", "apply_chat_template")
# Overrides that undo a run's settings for evaluations during training.
_WHOLE_SPLIT = {"eval.max_batches": "0", "eval.final_batches": "0", "eval.best": ""}
_VALIDATION = (
    "data.source",
    "data.validation_source",
    "data.validation_fraction",
    "data.validation_seed",
    "data.validation_split",
)
_OF_LOSS = ("eval.max_batches", "eval.by_source", "train.steps_per_dispatch")
_OF_TASK = (
    *(
        "eval.*",
        "-eval.*batches",
        "-eval.every_steps",
        "-eval.best",
        "-eval.safety*",
        "-eval.harness*",
    ),
    *("decode.*", "-decode.guard*"),
    *("-data.documents", "-data.isolate_documents", "-data.field"),
)
_OF_SAFETY = ("safety.*", "decode.*", "data.*", "-data.tokenizer*", "-data.batch_size")


def _steps(text: str) -> list[int]:
    steps = text.split(",")
    if not all(is_step(step) for step in steps):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of steps, such as 100,200")
    return list(dict.fromkeys(map(int, steps)))


def used_keys(args: argparse.Namespace) -> Patterns:
    """Return patterns of the configuration keys that the command uses."""
    if args.safety is not None:
        return (*MESH, *MODEL, *_OF_SAFETY)
    if args.code and args.samples:
        return ()
    if args.harness or args.code:
        return (*MESH, *MODEL, "decode.*", "-decode.guard*", "data.sequence_length")
    read = ("data.test_source",) if args.source or args.split == "test" else _VALIDATION
    scored = _OF_TASK if args.task else (*_OF_LOSS, "decode.weights")
    return (*MESH, *MODEL, *READING, *read, *scored)


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run the command; return the exit code."""
    if not args.workdir and not (args.code and args.samples):
        missing = "the following arguments are required: --workdir"
        raise UserError(f"lm eval: {missing}; see lm eval --help")
    if args.code:
        return _evaluate_code(args, overrides)
    for option in CODE_OPTIONS:
        if getattr(args, option) is not None:
            raise UserError(f"--{option} needs --code FILE")
    if args.safety is not None:
        return _evaluate_safety(args, overrides)
    if args.harness:
        return _evaluate_harness(args, overrides)
    for option in _OF_HARNESS:
        if getattr(args, option) not in (None, False):
            raise UserError(f"--{option} needs --harness TASK")
    from lm.data.splits import open_split
    from lm.decoding.weights import round_weights
    from lm.evaluation.task import check_task
    from lm.experiment import record_columns
    from lm.parallel.mesh import is_primary_host, print_on_primary_host
    from lm.runs.saved_params import restore_params

    split, overrides = _evaluated(args, overrides)
    first, *others = args.step or [None]
    experiment, params, step = _open_run(args, overrides, step=first, frozen=True)
    if args.task:
        check_task(experiment)
    config, tokenizer = experiment.config, experiment.tokenizer
    stores = open_split(config.data, split, tokenizer, record_columns(config), progress=True)
    if experiment.objective.precomputes:
        from lm.training.precomputed import with_precomputed

        workdir = open_run_folder(args.workdir)
        experiment = with_precomputed(experiment, stores, workdir, print_on_primary_host)
    name = args.source or split
    evaluate = _evaluate_task if args.task else _evaluate_loss
    reports = [evaluate(args, name, experiment, params, step, stores)]
    for step in others:
        workdir = open_run_folder(args.workdir)
        options = {"average": args.average, "step": step}
        params, _ = restore_params(experiment, workdir, print_on_primary_host, **options)
        params = round_weights(experiment, params, print_on_primary_host)
        reports.append(evaluate(args, name, experiment, params, step, stores))
    if is_primary_host():
        if args.json:
            print(json.dumps(reports if others else reports[0]))
        else:
            for report in reports:
                print_result(report, as_json=False)
    return 0


def _open_run(args: argparse.Namespace, overrides: Overrides, **options: Any) -> Any:
    """Return experiment, parameters rounded by `--config.decode.weights`, and step."""
    from lm.decoding.weights import round_weights
    from lm.parallel.mesh import print_on_primary_host

    experiment, params, step = open_run(args, overrides, **options)
    return experiment, round_weights(experiment, params, print_on_primary_host), step


def _evaluated(args: argparse.Namespace, overrides: Overrides) -> tuple[str, Overrides]:
    """Return the split to open, and overrides for --source."""
    if "data.tokenizer" in overrides:
        raise UserError("--config.data.tokenizer: runs are evaluated with their own tokenizer")
    if args.output and not args.task:
        raise UserError("--output needs --task, whose report it is for")
    if args.step and args.best:
        raise UserError("--step and --best select different checkpoints: give one of them")
    if args.output and len(args.step or ()) > 1:
        raise UserError("--output holds a single report: give one --step")
    if args.source is None:
        return args.split or "validation", _WHOLE_SPLIT | overrides
    if args.split or "data.test_source" in overrides:
        other = "--split" if args.split else "--config.data.test_source"
        raise UserError(f"--source and {other} select different data: give one of them")
    if not args.source.strip():
        raise UserError("--source is empty; give NAME:ARGUMENT, such as text:FILE")
    return "test", _WHOLE_SPLIT | overrides | {"data.test_source": args.source}


def _evaluate_loss(
    args: argparse.Namespace, name: str, experiment: Any, params: Any, step: int, stores: Any
) -> dict[str, Any]:
    from lm.evaluation.loss import evaluate_loss, losses_by_source
    from lm.parallel.mesh import is_primary_host
    from lm.progress import track

    batches = experiment.evaluation_batches(stores)
    shown = partial(track, description="evaluating", shown=is_primary_host())
    limit = experiment.config.eval.max_batches
    result = evaluate_loss(experiment, params, batches, stores, limit, shown)
    if not result["targets"]:
        raise UserError(f"{name}: the data have no targets, so there is no loss")
    result |= losses_by_source(experiment, params, stores, limit, shown)
    source = {"source": name} if args.source else {}
    return {"step": step, **source, **{f"eval/{name}/{k}": v for k, v in result.items()}}


def _evaluate_task(
    args: argparse.Namespace, name: str, experiment: Any, params: Any, step: int, stores: Any
) -> dict[str, Any]:
    from lm.evaluation.task import evaluate_task, require_writable, write_task_report
    from lm.parallel.mesh import is_primary_host

    label = short_name(name)
    folder = Path(args.output or open_run_folder(args.workdir) / "eval" / f"{label}-{step}")
    require_writable(folder)
    report, rows = evaluate_task(experiment, params, stores, progress=is_primary_host())
    report = {"step": step, "split": name, **report}
    if is_primary_host():
        write_task_report(folder, report, rows)
        print(f"report and predictions are in {storage_path(folder)}", file=sys.stderr)
    return report


def _evaluate_harness(args: argparse.Namespace, overrides: Overrides) -> int:
    """Evaluate on tasks of lm-eval; return the exit code."""
    if args.split or args.source or args.task:
        raise UserError("--harness has data of its own: without --split, --source and --task")
    if len(args.step or ()) > 1:
        raise UserError("--harness evaluates one checkpoint: give one --step")
    from lm.decoding.generate_file import weights_identity
    from lm.evaluation.beside_validation import HARNESS
    from lm.evaluation.harness import evaluate_tasks, task_figures
    from lm.evaluation.task import require_writable
    from lm.parallel.mesh import is_primary_host
    from lm.runs.metrics_file import record_figures

    experiment, params, step = _open_run(args, overrides, step=(args.step or [None])[0])
    folder = Path(args.output or open_run_folder(args.workdir) / "eval" / f"harness-{step}")
    require_writable(folder)
    results = evaluate_tasks(
        experiment,
        params,
        experiment.tokenizer,
        [task for task in args.harness.split(",") if task],
        folder,
        weights_identity(params, step),
        shots=args.shots,
        limit=args.limit,
        include_path=args.include_path,
        chat=args.apply_chat_template,
    )
    if is_primary_host():
        print(f"results are in {storage_path(folder)}", file=sys.stderr)
        figures = task_figures(results)
        if args.average == 1:
            record_figures(args.workdir, step, {HARNESS + k: x for k, x in figures.items()})
        print_result({"step": step, **figures}, args.json)
    return 0


def _evaluate_code(args: argparse.Namespace, overrides: Overrides) -> int:
    """Evaluate on problems of programming; return the exit code."""
    for option in ("split", "source", "task", "harness", "safety", "shots", "include_path"):
        if getattr(args, option) not in (None, False):
            raise UserError(f"--code has data of its own: without --{option}")
    if args.samples and args.workdir:
        raise UserError("--samples and --workdir both provide completions: give one of them")
    if args.step and args.best:
        raise UserError("--step and --best choose different checkpoints: give one of them")
    return evaluate_code(args, overrides)


def _write_figures(args: argparse.Namespace, folder: Path, step: int, figures: Any) -> None:
    """Write safety figures to FOLDER/STEP.json and metrics.jsonl.

    Figures of averaged parameters are not part of the trend, and go to a separate file.
    """
    from lm.runs.metrics_file import record_figures

    name = f"{step}.json" if args.average == 1 else f"{step}-average-{args.average}.json"
    (folder / name).write_text(json.dumps({"step": step, **figures}, indent=1) + "\n")
    if args.average == 1:
        record_figures(args.workdir, step, figures)


def _evaluate_safety(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run safety sets on checkpoints and write the page of their trend; return the exit code."""
    for option in ("split", "source", "task", "harness", *_OF_HARNESS):
        if getattr(args, option):
            raise UserError(f"--safety has data of its own: without --{option}")
    if args.step and args.best:
        raise UserError("--step and --best choose different checkpoints: give one of them")
    from lm.decoding.weights import round_weights
    from lm.evaluation.safety.suite import Subject, safety_figures
    from lm.evaluation.task import require_writable
    from lm.parallel.mesh import is_primary_host, print_on_primary_host
    from lm.progress import progress_bar
    from lm.runs.saved_params import restore_params
    from lm.tools.reports.safety_page import write_safety_page

    workdir = open_run_folder(args.workdir)
    names = args.safety or ",".join(SAFETY_SETS)
    first, *others = args.step or [None]
    experiment, params, step = _open_run(args, overrides | {"eval.safety": names}, step=first)
    folder = Path(args.output or workdir / "eval" / "safety")
    require_writable(folder)
    reports = []
    for later in (None, *others):
        if later is not None:
            options = {"average": args.average, "step": later}
            params, step = restore_params(experiment, workdir, print_on_primary_host, **options)
            params = round_weights(experiment, params, print_on_primary_host)
        with progress_bar(f"step {step}", None, shown=is_primary_host(), unit="row") as bar:
            subject = Subject(experiment, params, experiment.tokenizer, bar.update)
            figures = safety_figures(subject, print_on_primary_host, require=bool(args.safety))
        if not figures:
            raise UserError("no safety set fits this run")
        reports.append({"step": step, **figures})
        if is_primary_host():
            _write_figures(args, folder, step, figures)
    if is_primary_host():
        print(f"trend: {storage_path(write_safety_page(workdir, folder))}", file=sys.stderr)
        if args.json:
            print(json.dumps(reports if others else reports[0]))
        else:
            for report in reports:
                print_result(report, as_json=False)
    return 0
