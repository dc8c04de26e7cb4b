"""`lm VERB …`: one thin function a verb. Errors of the user are one line and exit code 2."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lm import config as configs
from lm.arguments import Overrides, parse
from lm.errors import UserError
from lm.schema import SCHEMA


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
    from lm.training.workdir import check_tokenizer

    experiment, params, step = _load_run(args, overrides)
    dataset = open_dataset(experiment.config.data, progress=True)
    check_tokenizer(Path(args.workdir), dataset.tokenizer)
    if not dataset.validation:
        raise UserError(
            "the run's configuration has no validation data; set config.data.validation_source"
        )
    batches = experiment.validation_batches(dataset)
    track = partial(tqdm, desc="evaluating", file=sys.stderr)
    result = evaluate(experiment, params, batches, dataset.validation_bytes, track=track)
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


VERBS = {
    "train": train,
    "eval": evaluate,
    "generate": generate,
    "params": params,
    "config": show_config,
    "tokenizer train": train_tokenizer,
}


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
        args, overrides = parse(arguments, VERBS)
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
