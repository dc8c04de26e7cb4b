"""The words of a command line: verbs, their options, `--config.PATH=VALUE` overrides."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from lm.errors import UserError
from lm.parallel.xla_flags import CHIPS

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


def _parser(functions: Mapping[str, Verb]) -> Parser:
    parser = Parser(prog="lm", description="Pretrain language models on many devices.")
    verbs = parser.add_subparsers(dest="verb", required=True, parser_class=Parser)

    def verb(name: str, parent: Any = verbs) -> Parser:
        function = functions[name]
        sub = parent.add_parser(
            name.split()[-1],
            help=function.__doc__,
            description=function.__doc__,
            allow_abbrev=False,
        )
        sub.set_defaults(function=function)
        return sub

    def config(sub: Parser, required: bool = True) -> None:
        sub.add_argument("--config", required=required, metavar="FILE.py[:VARIANT]")

    def processes(sub: Parser) -> None:
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

    def weights(sub: Parser) -> None:
        sub.add_argument("--average", type=_at_least(1), default=1, metavar="N", help=AVERAGE)
        sub.add_argument("--best", action="store_true", help="the best checkpoint by eval.best")

    def json_flag(sub: Parser) -> None:
        sub.add_argument("--json", action="store_true", help="print one JSON object, nothing else")

    sub = verb("train")
    config(sub)
    sub.add_argument("--workdir", required=True, metavar="DIR")
    sub.add_argument("--xla_flags", choices=CHIPS, help="compiler flags for this chip")
    processes(sub)

    sub = verb("launch")
    sub.usage = "lm launch --processes N [OPTIONS] -- train …"
    sub.add_argument("--processes", type=_at_least(1), required=True, metavar="N")
    sub.add_argument("--gpus", type=_at_least(0), default=0, metavar="G", help="split among them")
    sub.add_argument(
        "--restarts", type=_at_least(0), default=10, metavar="N", help="without a new checkpoint"
    )
    sub.add_argument(
        "--backoff", type=_at_least(0.0), default=1.0, metavar="S", help="first pause; doubles"
    )

    sub = verb("sweep")
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

    sub = verb("eval")
    sub.add_argument("--workdir", required=True, metavar="DIR")
    sub.add_argument("--split", choices=("validation", "test"), default="validation")
    sub.add_argument("--task", action="store_true", help="scores and predictions of a task")
    sub.add_argument("--output", metavar="DIR", help="for --task; WORKDIR/eval/SPLIT-STEP")
    weights(sub)
    json_flag(sub)
    processes(sub)

    sub = verb("generate")
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
    weights(sub)
    json_flag(sub)
    processes(sub)

    sub = verb("merge")
    sub.add_argument("--workdir", required=True, metavar="DIR")
    sub.add_argument("--to", required=True, metavar="DIR")
    sub.add_argument("--average", type=_at_least(1), default=1, metavar="N", help=AVERAGE)
    processes(sub)

    sub = verb("import")
    sub.add_argument("--from", dest="source", required=True, metavar="DIR", help="or a .bin file")
    sub.add_argument("--workdir", required=True, metavar="DIR")
    processes(sub)

    sub = verb("export")
    sub.add_argument("--workdir", required=True, metavar="DIR")
    sub.add_argument("--to", required=True, metavar="DIR")
    sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    weights(sub)

    sub = verb("params")
    config(sub)
    json_flag(sub)

    sub = verb("plan")
    config(sub)
    sub.add_argument("--topology", required=True, metavar="KIND:SHAPE", help=TOPOLOGY)
    sub.add_argument("--slices", type=_at_least(1), default=1, metavar="N", help="of that shape")
    sub.add_argument("--search", action="store_true", help="rank meshes, remat, microbatches")
    sub.add_argument("--limit", type=_at_least(1), default=24, metavar="N", help=LIMIT)
    sub.add_argument("--workers", type=_at_least(0), default=0, metavar="N", help=WORKERS)
    sub.add_argument("--output", metavar="FILE", help="--search: the winner's overrides")
    json_flag(sub)

    sub = verb("config")
    config(sub, required=False)
    sub.add_argument("--keys", action="store_true", help="list every key with its meaning")
    json_flag(sub)

    sub = verb("vectors")
    sub.add_argument("--workdir", metavar="DIR", help="a run with the words tokenizer")
    sub.add_argument("--vectors", metavar="FILE", help="GloVe's or word2vec's text format")
    sub.add_argument("--output", metavar="FILE.txt[.gz]", help="write them in GloVe's format")
    sub.add_argument(
        "--similarity", action="append", default=[], metavar="FILE", help="word, word, score a line"
    )
    sub.add_argument("--analogies", metavar="FILE", help="word2vec's questions-words.txt")
    weights(sub)
    json_flag(sub)

    sub = verb("report")
    sub.add_argument("--workdir", required=True, metavar="DIR", help="a run, or a folder of runs")
    sub.add_argument("--output", metavar="DIR", help="for index.html and PNGs; WORKDIR/report")

    sub = verb("scaling")
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
    json_flag(sub)

    tokenizer = verbs.add_parser("tokenizer", help="Tokenizers.").add_subparsers(
        dest="action", required=True, parser_class=Parser
    )
    sub = verb("tokenizer train", tokenizer)
    sub.add_argument("--source", required=True, help="as config.data.source")
    sub.add_argument("--vocab_size", type=_at_least(2), required=True, metavar="N")
    sub.add_argument("--model_type", choices=("bpe", "unigram"), default="bpe")
    sub.add_argument("--output", required=True, metavar="FILE.model")
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
