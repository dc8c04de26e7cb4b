"""`lm VERB …`: one thin function a verb. Errors of the user are one line and exit code 2."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from lm import config as configs
from lm.errors import UserError
from lm.schema import SCHEMA

Overrides = dict[str, str]


class Parser(argparse.ArgumentParser):
    """argparse, with its errors as one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message} (lm {self.prog.split()[-1]} --help)")


def train(args: argparse.Namespace, overrides: Overrides) -> int:
    """Train a model, or continue the run in --workdir."""
    config = configs.load(args.config, overrides)
    from lm.training.preemption import EXIT_CODE
    from lm.training.train import train

    return 0 if train(config, Path(args.workdir)) else EXIT_CODE


def evaluate(args: argparse.Namespace, overrides: Overrides) -> int:
    """Loss, perplexity and bits per byte of a run on its whole validation split."""
    from tqdm import tqdm

    from lm.data.dataset import open_dataset
    from lm.evaluation.loss import evaluate

    experiment, params, step = _load_run(args, overrides)
    dataset = open_dataset(experiment.config.data, progress=True)
    from lm.training.workdir import check_tokenizer

    check_tokenizer(Path(args.workdir), dataset.tokenizer)
    if not dataset.validation:
        raise UserError(
            "the run's configuration has no validation data; set config.data.validation_source"
        )
    batches = experiment.validation_batches(dataset)
    n_bytes = sum(store.manifest.n_bytes for store in dataset.validation)
    track = partial(tqdm, desc="evaluating", file=sys.stderr)
    result = evaluate(
        experiment, params, batches, n_bytes, track=lambda items, total: track(items, total=total)
    )
    report = {"step": step, **{f"eval/validation/{k}": v for k, v in result.items()}}
    _print_result(report, args.json)
    return 0


def generate(args: argparse.Namespace, overrides: Overrides) -> int:
    """Continue prompts with a trained model."""
    from lm.decoding.sampling import Sampling
    from lm.decoding.text import continuations
    from lm.training.workdir import load_tokenizer

    experiment, params, _ = _load_run(args, overrides)
    tokenizer = load_tokenizer(Path(args.workdir))
    temperature = 0.0 if args.greedy else args.temperature
    sampling = Sampling(temperature, args.top_k, args.top_p)
    prompts = args.prompt or [""]
    steps = continuations(
        experiment.model, params, tokenizer, prompts, args.max_new_tokens, sampling, args.seed
    )
    _print_continuations(prompts, steps, args.json)
    return 0


def params(args: argparse.Namespace, overrides: Overrides) -> int:
    """Count the parameters of a configuration."""
    import jax

    from lm.experiment import build
    from lm.parameters import count_parameters

    experiment = build(configs.load(args.config, overrides), jax.devices()[:1])
    counts = {"config": args.config, "paper": experiment.config.paper}
    counts |= count_parameters(experiment)
    if args.json:
        print(json.dumps(counts))
        return 0
    for name, (shape, axes) in counts["tensors"].items():
        print(f"{name:45} {'×'.join(map(str, shape)):>20}  {' '.join(axes)}")
    print(f"non-embedding {counts['non_embedding']:,}")
    print(f"total {counts['total']:,}")
    return 0


def show_config(args: argparse.Namespace, overrides: Overrides) -> int:
    """Print a resolved configuration, or with --keys what every key means."""
    if args.keys:
        for path, key in SCHEMA.items():
            choices = f" [{', '.join(key.choices)}]" if key.choices else ""
            print(f"{path} = {key.default!r}\n    {key.help}{choices}")
        return 0
    if not args.config:
        raise UserError("lm config: give --config FILE.py[:VARIANT], or --keys")
    config = configs.load(args.config, overrides)
    if args.json:
        print(json.dumps(dict(configs.flatten(config))))
    else:
        for path, value in configs.flatten(config):
            print(f"{path} = {value!r}")
    return 0


def train_tokenizer(args: argparse.Namespace, overrides: Overrides) -> int:
    """Train a SentencePiece model on a corpus and write it to a file."""
    from lm.data.corpora import open_corpus, sources
    from lm.data.sentencepiece import train_sentencepiece

    config = configs.default()
    config.data.source = args.source
    for path, text in overrides.items():
        configs.set_value(config, path, configs.parse_value(path, text))
    configs.validate(config)
    texts = (
        piece.text
        for spec in sources(config.data.source)
        for piece in open_corpus(spec, config.data, "train").pieces()
    )
    model = train_sentencepiece(texts, args.vocab_size, args.model_type)
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(model)
    print(f"{output}: {args.vocab_size} pieces; use --config.data.tokenizer=sentencepiece:{output}")
    return 0


def _load_run(args: argparse.Namespace, overrides: Overrides) -> tuple[Any, Any, int]:
    """The experiment, parameters and step of the run in --workdir, on all devices."""
    import jax

    from lm.experiment import build
    from lm.training.train import restore_params
    from lm.training.workdir import load_config

    one_copy_a_device = {f"parallel.mesh.{axis}": "1" for axis in ("slice", "fsdp", "tensor")}
    mesh = {"parallel.preset": "custom", "parallel.mesh.data": "-1"} | one_copy_a_device
    config = load_config(Path(args.workdir), mesh | overrides)
    experiment = build(config, jax.devices())
    parameters, step = restore_params(experiment, Path(args.workdir))
    return experiment, parameters, step


def _print_result(values: dict, as_json: bool) -> None:
    if as_json:
        print(json.dumps(values))
        return
    for name, value in values.items():
        print(f"{name} = {value:.6g}")


def _print_continuations(prompts: Sequence[str], steps: Iterable[list[str]], as_json: bool) -> None:
    """One prompt streams as it grows; several are printed whole, one after the other."""
    streams = len(prompts) == 1 and not as_json
    texts = [""] * len(prompts)
    for number, parts in enumerate(steps):
        texts = [text + part for text, part in zip(texts, parts, strict=True)]
        if streams:
            print(parts[0] if number else prompts[0] + parts[0], end="", flush=True)
    if streams:
        print()
    elif as_json:
        print(json.dumps([{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)]))
    else:
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), 1):
            print(f"--- {number}\n{prompt}{text}")


def _parser() -> Parser:
    parser = Parser(prog="lm", description="Pretrain language models on many devices.")
    verbs = parser.add_subparsers(dest="verb", required=True, parser_class=Parser)

    def verb(name: str, function: Callable, parent: Any = verbs) -> Parser:
        sub = parent.add_parser(
            name, help=function.__doc__, description=function.__doc__, allow_abbrev=False
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

    def json_flag(sub: Parser) -> None:
        sub.add_argument("--json", action="store_true", help="print one JSON object, nothing else")

    sub = verb("train", train)
    config(sub)
    sub.add_argument("--workdir", required=True, metavar="DIR")
    processes(sub)

    sub = verb("eval", evaluate)
    sub.add_argument("--workdir", required=True, metavar="DIR")
    json_flag(sub)
    processes(sub)

    sub = verb("generate", generate)
    sub.add_argument("--workdir", required=True, metavar="DIR")
    sub.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    sub.add_argument("--max_new_tokens", type=_at_least(1), default=200, metavar="N")
    sub.add_argument("--temperature", type=_at_least(0.0), default=0.8)
    sub.add_argument("--greedy", action="store_true", help="temperature 0")
    sub.add_argument("--top_k", type=_at_least(0), default=0, metavar="K")
    sub.add_argument("--top_p", type=_probability, default=1.0, metavar="P")
    sub.add_argument("--seed", type=_at_least(0), default=0)
    json_flag(sub)
    processes(sub)

    sub = verb("params", params)
    config(sub)
    json_flag(sub)

    sub = verb("config", show_config)
    config(sub, required=False)
    sub.add_argument("--keys", action="store_true", help="list every key with its meaning")
    json_flag(sub)

    tokenizer = verbs.add_parser("tokenizer", help="Tokenizers.").add_subparsers(
        dest="action", required=True, parser_class=Parser
    )
    sub = verb("train", train_tokenizer, tokenizer)
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


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, Overrides]:
    """The verb's arguments, and the `--config.PATH=VALUE` (or `--config.PATH VALUE`) overrides."""
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
    return _parser().parse_args(rest), overrides


def _set_up_jax(args: argparse.Namespace) -> None:
    from absl import logging

    # Orbax logs the traceback of what it raises; the error itself comes to us.
    logging.set_verbosity(logging.FATAL)
    devices = getattr(args, "cpu_devices", None)
    if devices is not None:
        import jax

        if devices < 1:
            raise UserError(f"--cpu_devices {devices} is below 1")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
    if hasattr(args, "coordinator"):
        from lm.parallel.hosts import initialize

        initialize(args.coordinator, args.num_processes, args.process_id)


def _run(arguments: Sequence[str]) -> int:
    try:
        args, overrides = _parse(arguments)
        _set_up_jax(args)
        return args.function(args, overrides)
    except UserError as error:
        message = str(error)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  so that the exit does not fail too
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = f"the disk is full: {error.filename or error}"
    except KeyboardInterrupt:
        return 130
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code: 0 done, 2 an error of the user's, 75 stopped and resumable."""
    try:
        code = _run(sys.argv[1:] if arguments is None else arguments)
    except Exception:
        traceback.print_exc()
        code = 1
    if code in (1, 2):
        from lm.parallel.hosts import leave

        leave(code)
    return code
