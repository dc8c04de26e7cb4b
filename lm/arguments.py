"""The words of a command line: verbs, their options, `--config.PATH=VALUE` overrides."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from lm.errors import UserError

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

    def weights(sub: Parser) -> None:
        sub.add_argument("--average", type=_at_least(1), default=1, metavar="N", help=AVERAGE)
        sub.add_argument("--best", action="store_true", help="the best checkpoint by eval.best")

    def json_flag(sub: Parser) -> None:
        sub.add_argument("--json", action="store_true", help="print one JSON object, nothing else")

    sub = verb("train")
    config(sub)
    sub.add_argument("--workdir", required=True, metavar="DIR")
    processes(sub)

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


def _probability(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def parse(
    arguments: Sequence[str], functions: Mapping[str, Verb]
) -> tuple[argparse.Namespace, Overrides]:
    """The chosen verb (`.function`) with its options, and the overrides.

    An override is `--config.PATH=VALUE` or `--config.PATH VALUE`.
    """
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
    return _parser(functions).parse_args(rest), overrides
