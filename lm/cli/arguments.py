"""Command-line parsing, options shared by several commands, and printing of results."""

from __future__ import annotations

import argparse
import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NoReturn

from lm.errors import UserError

Overrides = dict[str, str]

AVERAGE = "average the parameters of the last N checkpoints"


class _HelpFormatter(argparse.HelpFormatter):
    """Help that ends with the default, unless that is empty or the text mentions it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        is_empty = action.default in (None, "", [], argparse.SUPPRESS)
        if is_empty or isinstance(action.default, bool) or "default" in text:
            return text
        return f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, and defaults in the help."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_HelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        key = re.search(r"unrecognized.* (--)?(\w+(\.\w+)+)(?(1)|=)", message)
        hint = f"configuration keys are written --config.{key[2]}=VALUE; " if key else ""
        raise UserError(f"{self.prog}: {message}; {hint}see {self.prog} --help")


def parse(
    arguments: Sequence[str], verbs: Mapping[str, str]
) -> tuple[argparse.Namespace, Overrides]:
    """Parse a command line; only the module of its command is imported.

    An override is `--config.PATH=VALUE` or `--config.PATH VALUE`. Words after `--` form another
    command and are not parsed.

    Args:
        arguments: words after `lm`.
        verbs: help line of each command.

    Returns:
        The options, with `module` (of the command) and `command` (words after `--`, or None), and
            the overrides.
    """
    arguments, command = _split_at_dashes(arguments)
    rest: list[str] = []
    overrides: Overrides = {}
    words = iter(arguments)
    for word in words:
        if not word.startswith("--config."):
            rest.append(word)
            continue
        path, equals, value = word.removeprefix("--config.").partition("=")
        if not equals:
            value = next(words, "")
            if not value or value.startswith("--"):
                raise UserError(f"{word} has no value; write {word}=VALUE")
        if overrides.setdefault(path, value) != value:
            both = f"{overrides[path]} and {value}"
            raise UserError(f"--config.{path} is given twice: {both}; keep one of them")
    args = _parser(rest, verbs).parse_args(rest)
    if args.verb == "launch" and command is None:
        raise UserError("lm launch needs a command: lm launch --processes N -- train …")
    if args.verb not in ("launch", "sweep") and command is not None:
        raise UserError(f"lm {args.verb} takes no arguments after --")
    args.command = command
    return args, overrides


def _split_at_dashes(words: Sequence[str]) -> tuple[Sequence[str], Sequence[str] | None]:
    if "--" not in words:
        return words, None
    i = list(words).index("--")
    return words[:i], words[i + 1 :]


def verb_module(verb: str) -> ModuleType:
    """Import the module of a command."""
    return importlib.import_module(f"lm.cli.{verb.replace(' ', '_')}_command")


def _parser(arguments: Sequence[str], verbs: Mapping[str, str]) -> Parser:
    """Return the parser, with the options of the command that the arguments start with."""
    parser = Parser(prog="lm", description="Train, evaluate and serve language models.")
    top = parser.add_subparsers(dest="verb", required=True, parser_class=Parser)
    groups = {"": top}
    for verb, about in verbs.items():
        group, _, last = verb.rpartition(" ")
        if group not in groups:
            actions = ", ".join(verb.split()[1] for verb in verbs if verb.startswith(f"{group} "))
            inner = top.add_parser(group, help=f"Command group: {actions}.")
            groups[group] = inner.add_subparsers(dest="action", required=True, parser_class=Parser)
        sub = groups[group].add_parser(last, help=about, description=about, allow_abbrev=False)
        words = verb.split()
        if list(arguments[: len(words)]) == words:
            module = verb_module(verb)
            sub.set_defaults(module=module)
            module.add_arguments(sub)
    return parser


# --- options shared by several commands


def config_argument(parser: Parser, required: bool = True) -> None:
    """Add --config."""
    about = "configuration file and variant, or a run's run.json"
    parser.add_argument("--config", required=required, metavar="FILE.py[:VARIANT]", help=about)


def workdir_argument(parser: Parser, about: str = "folder or bucket URL of the run") -> None:
    """Add --workdir of one run."""
    parser.add_argument("--workdir", required=True, metavar="DIR", help=about)


def device_arguments(parser: Parser) -> None:
    """Add --cpu_devices."""
    parser.add_argument("--cpu_devices", type=int, metavar="N", help="simulate N CPU devices")


def process_arguments(parser: Parser) -> None:
    """Add the options of a command that may run as several processes."""
    device_arguments(parser)
    group = parser.add_argument_group(
        "several processes (only needed without SLURM, GKE or lm launch)"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    group.add_argument("--num_processes", type=int, metavar="N", help="number of processes")
    group.add_argument("--process_id", type=int, metavar="I", help="index of this process, from 0")
    group.add_argument(
        "--heartbeat_seconds",
        type=at_least(1),
        default=100,
        metavar="S",
        help="end the run if a process does not respond for this long",
    )


def compiler_arguments(parser: Parser) -> None:
    """Add --xla_flags and --dump_hlo."""
    from lm.hardware import GPUS, TPUS

    parser.add_argument(
        "--xla_flags", choices=TPUS + GPUS, help="use the compiler flags for this chip"
    )
    parser.add_argument("--dump_hlo", metavar="DIR", help="write compiled programs as HLO text")


def topology_arguments(parser: Parser, required: bool = True) -> None:
    """Add --topology and --slices."""
    examples = "v5p:4x4x4 or v5p-128, v5e:16x16, h100:HOSTSxGPUS, cpu:8, …"
    parser.add_argument(
        "--topology",
        required=required,
        metavar="KIND:SHAPE",
        help=f"chips and their number or topology: {examples}",
    )
    parser.add_argument(
        "--slices", type=at_least(1), default=1, metavar="N", help="number of such slices"
    )


def weights_arguments(parser: Parser) -> None:
    """Add the options that select the weights of a run."""
    parser.add_argument("--average", type=at_least(1), default=1, metavar="N", help=AVERAGE)
    parser.add_argument("--best", action="store_true", help="use the checkpoint kept by eval.best")


def sampling_arguments(parser: Parser) -> None:
    """Add the sampling options."""
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="stop before this text; repeatable",
    )
    parser.add_argument(
        "--max_new_tokens",
        type=at_least(1),
        metavar="N",
        help="same as --config.decode.max_length",
    )
    for name, kind, default, metavar, about in (
        ("temperature", at_least(0.0), 0.8, "T", "sampling temperature"),
        ("top_k", at_least(0), 0, "K", "sample from the K most likely tokens; 0: from all"),
        ("top_p", probability, 1.0, "P", "nucleus sampling: smallest set with this probability"),
        ("seed", at_least(0), 0, "N", "random seed"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, metavar=metavar, help=about)
    parser.add_argument("--greedy", action="store_true", help="same as --temperature 0")


def check_texts(texts: Sequence[str]) -> None:
    """Raise UserError for a command-line text that is not UTF-8."""
    for text in texts:
        if text.encode(errors="ignore").decode() != text:
            raise UserError(f"{text!a}: command-line text must be UTF-8")


def json_argument(parser: Parser) -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help="print only one JSON object")


def at_least(low: int | float) -> Callable[[str], int | float]:
    """Return an argument type for numbers of at least `low`."""

    def parse(text: str) -> int | float:
        value = type(low)(text)
        if not low <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a number of at least {low}")
        return value

    parse.__name__ = "integer" if isinstance(low, int) else "number"
    return parse


def positive(text: str) -> float:
    """Parse a number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def probability(text: str) -> float:
    """Parse a number above 0 and at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0 and at most 1")
    return value


# --- runs and results


def open_run(
    args: argparse.Namespace,
    overrides: Overrides,
    any_batch: bool = False,
    step: int | None = None,
    heads_optional: bool = False,
    frozen: bool = False,
) -> tuple[Any, Any, int]:
    """Load the run selected by `--workdir`, `--average` and `--best`.

    Args:
        args: command-line options.
        overrides: configuration keys from the command line.
        any_batch: see `restore_run`.
        step: see `restore_run`.
        heads_optional: see `restore_params`.
        frozen: see `restore_run`.
    """
    from lm.cli.used_keys import print_without_effect
    from lm.parallel.mesh import print_on_primary_host
    from lm.runs.saved_params import load_tokenizer, restore_run
    from lm.storage import open_run_folder

    workdir = open_run_folder(args.workdir)
    options = {"average": args.average, "best": args.best, "any_batch": any_batch}
    options |= {"step": step, "heads_optional": heads_optional, "frozen": frozen}
    experiment, params, step = restore_run(workdir, overrides, print_on_primary_host, **options)
    print_without_effect(experiment.config, overrides, print_on_primary_host)
    if experiment.tokenizer is None:
        load_tokenizer(workdir)  # raises UserError
    return experiment, params, step


def only_cpu() -> None:
    """Use the CPU, because the runs that a command reads may be using the accelerator."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def print_result(values: Mapping[str, Any], as_json: bool) -> None:
    """Print metrics, one per line or as one JSON object."""
    if as_json:
        print(json.dumps(values))
        return
    from lm.evaluation.loss import figure_text

    for name, value in values.items():
        shown = figure_text(name, value) if isinstance(value, float) else value
        print(f"{name} = {shown}")
