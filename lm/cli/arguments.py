"""The words of a command line: verbs, their options, `--config.PATH=VALUE` overrides."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from lm.errors import UserError
from lm.hardware import GPUS, TPUS

Overrides = dict[str, str]
Verb = Callable[[argparse.Namespace, Overrides], int]


TOPOLOGY = "v5p:4x4x4, v5e:16x16, h100:HOSTSxGPUS, cpu:8, …"
LIMIT = "--search: most candidates that are compiled"
WORKERS = "--search: compiling processes; 0: one a core"
AVERAGE = "mean parameters of the last N checkpoints"


class Parser(argparse.ArgumentParser):
    """argparse, with its errors as one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")


def _config(sub: Parser, required: bool = True) -> None:
    sub.add_argument("--config", required=required, metavar="FILE.py[:VARIANT]")


def _processes(sub: Parser) -> None:
    sub.add_argument("--cpu_devices", type=int, metavar="N", help="simulate N CPU devices")
    sub.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    sub.add_argument("--num_processes", type=int, metavar="N")
    sub.add_argument("--process_id", type=int, metavar="I")
    sub.add_argument(
        "--heartbeat_seconds",
        type=_at_least(1),
        default=100,
        metavar="S",
        help="a process that is silent for so long ends the run (several processes)",
    )


def _xla_flags(sub: Parser) -> None:
    sub.add_argument("--xla_flags", choices=TPUS + GPUS, help="compiler flags for this chip")


def _weights(sub: Parser) -> None:
    sub.add_argument("--average", type=_at_least(1), default=1, metavar="N", help=AVERAGE)
    sub.add_argument("--best", action="store_true", help="the best checkpoint by eval.best")


def _json_flag(sub: Parser) -> None:
    sub.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def _train_options(sub: Parser) -> None:
    _config(sub)
    sub.add_argument("--workdir", required=True, metavar="DIR")
    _xla_flags(sub)
    _processes(sub)


def _launch_options(sub: Parser) -> None:
    sub.usage = "lm launch --processes N [OPTIONS] -- train …"
    sub.add_argument("--processes", type=_at_least(1), required=True, metavar="N")
    sub.add_argument("--gpus", type=_at_least(0), default=0, metavar="G", help="split among them")
    sub.add_argument(
        "--restarts", type=_at_least(0), default=10, metavar="N", help="without a new checkpoint"
    )
    sub.add_argument(
        "--backoff", type=_at_least(0.0), default=1.0, metavar="S", help="first pause; doubles"
    )


def _sweep_options(sub: Parser) -> None:
    sub.usage = "lm sweep --config SWEEP.py[:VARIANT] --workdir DIR [OPTIONS] [-- TRAIN OPTIONS]"
    sub.add_argument("--config", required=True, metavar="SWEEP.py[:VARIANT]")
    sub.add_argument("--workdir", required=True, metavar="DIR")
    sub.add_argument("--launcher", choices=("local", "slurm", "tpu"), default="local")
    sub.add_argument("--launcher_options", default="", metavar="TEXT", help="of sbatch or tpu/")
    sub.add_argument(
        "--parallel", type=_at_least(1), metavar="N", help="runs at a time: 1; all under slurm"
    )
    sub.add_argument("--gpus", type=_at_least(0), default=0, metavar="G", help="split among them")
    sub.add_argument(
        "--retries", type=_at_least(0), default=2, metavar="N", help="of a run that fails"
    )
    sub.add_argument("--dry_run", action="store_true", help="print every run and its command")


def _eval_options(sub: Parser) -> None:
    sub.add_argument("--workdir", required=True, metavar="DIR")
    sub.add_argument("--split", choices=("validation", "test"), default="validation")
    sub.add_argument("--task", action="store_true", help="scores and predictions of a task")
    sub.add_argument("--output", metavar="DIR", help="for --task; WORKDIR/eval/SPLIT-STEP")
    _weights(sub)
    _json_flag(sub)
    _processes(sub)


def _generate_options(sub: Parser) -> None:
    sub.add_argument("--workdir", required=True, metavar="DIR")
    sub.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    sub.add_argument("--input", metavar="FILE", help="prompts or sources: a line, or .jsonl")
    sub.add_argument("--output", metavar="FILE", help="a line an input, or .jsonl; continued")
    sub.add_argument("--n_best", type=_at_least(1), default=1, metavar="N", help="in JSON only")
    sub.add_argument(
        "--max_new_tokens",
        type=_at_least(1),
        metavar="N",
        help="same as --config.decode.max_length",
    )
    sub.add_argument("--temperature", type=_at_least(0.0), default=0.8)
    sub.add_argument("--greedy", action="store_true", help="temperature 0")
    sub.add_argument("--top_k", type=_at_least(0), default=0, metavar="K")
    sub.add_argument("--top_p", type=_probability, default=1.0, metavar="P")
    sub.add_argument("--seed", type=_at_least(0), default=0)
    _weights(sub)
    _json_flag(sub)
    _processes(sub)


def _merge_options(sub: Parser) -> None:
    sub.add_argument("--workdir", required=True, metavar="DIR")
    sub.add_argument("--to", required=True, metavar="DIR")
    sub.add_argument("--average", type=_at_least(1), default=1, metavar="N", help=AVERAGE)
    _processes(sub)


def _import_options(sub: Parser) -> None:
    sub.add_argument("--from", dest="source", required=True, metavar="DIR", help="or a .bin file")
    sub.add_argument("--workdir", required=True, metavar="DIR")
    _processes(sub)


def _export_options(sub: Parser) -> None:
    sub.add_argument("--workdir", required=True, metavar="DIR")
    sub.add_argument("--to", required=True, metavar="DIR")
    sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    _weights(sub)


def _params_options(sub: Parser) -> None:
    _config(sub, required=False)
    sub.add_argument(
        "--all",
        nargs="?",
        const="experiments",
        metavar="DIR",
        help="every variant of every experiment file in DIR (experiments)",
    )
    _json_flag(sub)


def _plan_options(sub: Parser) -> None:
    _config(sub)
    sub.add_argument("--topology", required=True, metavar="KIND:SHAPE", help=TOPOLOGY)
    sub.add_argument("--slices", type=_at_least(1), default=1, metavar="N", help="of that shape")
    sub.add_argument("--search", action="store_true", help="rank meshes, remat, microbatches")
    sub.add_argument("--limit", type=_at_least(1), default=24, metavar="N", help=LIMIT)
    sub.add_argument("--workers", type=_at_least(0), default=0, metavar="N", help=WORKERS)
    sub.add_argument("--output", metavar="FILE", help="--search: the winner's overrides")
    _xla_flags(sub)
    _json_flag(sub)


def _config_options(sub: Parser) -> None:
    _config(sub, required=False)
    sub.add_argument("--keys", action="store_true", help="list every key with its meaning")
    _json_flag(sub)


def _vectors_options(sub: Parser) -> None:
    sub.add_argument("--workdir", metavar="DIR", help="a run with the words tokenizer")
    sub.add_argument("--vectors", metavar="FILE", help="GloVe's or word2vec's text format")
    sub.add_argument("--output", metavar="FILE.txt[.gz]", help="write them in GloVe's format")
    sub.add_argument(
        "--similarity", action="append", default=[], metavar="FILE", help="word, word, score a line"
    )
    sub.add_argument("--analogies", metavar="FILE", help="word2vec's questions-words.txt")
    _weights(sub)
    _json_flag(sub)


def _report_options(sub: Parser) -> None:
    sub.add_argument("--workdir", required=True, metavar="DIR", help="a run, or a folder of runs")
    sub.add_argument("--output", metavar="DIR", help="for index.html and PNGs; WORKDIR/report")


def _scaling_options(sub: Parser) -> None:
    sub.add_argument("--workdir", metavar="DIR", help="a folder of finished runs")
    sub.add_argument("--runs", metavar="FILE.csv", help="Model Size, Training FLOP, loss")
    sub.add_argument(
        "--budget",
        type=_positive,
        action="append",
        default=[],
        metavar="FLOPS",
        help="forecast the best run of so many FLOPs; may be given several times",
    )
    sub.add_argument("--output", metavar="DIR", help="for PNGs; WORKDIR/scaling, or none")
    sub.add_argument(
        "--min_tokens_per_parameter",
        type=_at_least(0.0),
        default=0.45,
        metavar="X",
        help="leave out runs of fewer: they hardly left their initial loss",
    )
    sub.add_argument("--resamples", type=_at_least(20), default=1000, metavar="N")
    sub.add_argument("--seed", type=_at_least(0), default=0)
    _json_flag(sub)


def _tokenizer_train_options(sub: Parser) -> None:
    sub.add_argument("--source", required=True, help="as --config.data.source")
    sub.add_argument("--vocab_size", type=_at_least(2), required=True, metavar="N")
    sub.add_argument("--model_type", choices=("bpe", "unigram"), default="bpe")
    sub.add_argument("--output", required=True, metavar="FILE.model")


OPTIONS: dict[str, Callable[[Parser], None]] = {
    "train": _train_options,
    "launch": _launch_options,
    "sweep": _sweep_options,
    "eval": _eval_options,
    "generate": _generate_options,
    "merge": _merge_options,
    "import": _import_options,
    "export": _export_options,
    "params": _params_options,
    "plan": _plan_options,
    "config": _config_options,
    "vectors": _vectors_options,
    "report": _report_options,
    "scaling": _scaling_options,
    "tokenizer train": _tokenizer_train_options,
}


def _parser(functions: Mapping[str, Verb]) -> Parser:
    parser = Parser(prog="lm", description="Pretrain language models on many devices.")
    top = parser.add_subparsers(dest="verb", required=True, parser_class=Parser)
    groups = {"": top}
    for name, function in functions.items():
        group, _, last = name.rpartition(" ")
        if group not in groups:
            inner = top.add_parser(group, help=f"{group.capitalize()}s.")
            groups[group] = inner.add_subparsers(dest="action", required=True, parser_class=Parser)
        about = function.__doc__
        sub = groups[group].add_parser(last, help=about, description=about, allow_abbrev=False)
        sub.set_defaults(function=function)
        OPTIONS[name](sub)
    return parser


def _at_least(low: int | float) -> Callable[[str], int | float]:
    def parse(text: str) -> int | float:
        value = type(low)(text)
        if not low <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low}")
        return value

    parse.__name__ = "integer" if isinstance(low, int) else "number"
    return parse


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def _probability(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def parse(
    arguments: Sequence[str], functions: Mapping[str, Verb]
) -> tuple[argparse.Namespace, Overrides]:
    """The chosen verb (`.function`) with its options, and the overrides.

    An override is `--config.PATH=VALUE` or `--config.PATH VALUE`. What follows `--` is another
    command, left as it is (`.command`).
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
        overrides[path] = value
    args = _parser(functions).parse_args(rest)
    if args.verb == "launch" and command is None:
        raise UserError("lm launch needs a command: lm launch --processes N -- train …")
    if args.verb not in ("launch", "sweep") and command is not None:
        raise UserError(f"lm {args.verb} takes nothing after --")
    args.command = command
    return args, overrides


def _split_at_dashes(words: Sequence[str]) -> tuple[Sequence[str], Sequence[str] | None]:
    if "--" not in words:
        return words, None
    i = list(words).index("--")
    return words[:i], words[i + 1 :]
