"""`lm VERB …`: one thin function a verb. Errors of the user are one line and exit code 2."""

from __future__ import annotations

import argparse
import errno
import hashlib
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


def launch(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run a command as several processes on this host, and start them again when one dies."""
    from lm.launch.launch import launch
    from lm.launch.supervise import Policy

    if overrides:
        raise UserError("lm launch: --config.… goes after --, with the command")
    return launch(args.command, args.processes, args.gpus, Policy(args.restarts, args.backoff))


def sweep(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run, or continue, every run of a sweep file; --config.a.b=VALUE goes to every run."""
    from lm.sweeps.command import dry_run, locked, run_sweep
    from lm.sweeps.launchers import make
    from lm.sweeps.sweep import load

    folder = Path(args.workdir)
    loaded, runs = load(args.config, folder, overrides, args.command or ())
    parallel = args.parallel or (len(runs) if args.launcher == "slurm" else 1)
    options = args.launcher, parallel, args.gpus, args.launcher_options
    if args.dry_run:
        dry_run(runs, make(*options, keep_open=()), parallel)
        return 0
    with locked(folder) as lock:
        launcher = make(*options, keep_open=(lock,))
        return run_sweep(loaded, runs, folder, launcher, parallel, args.retries)


def evaluate(args: argparse.Namespace, overrides: Overrides) -> int:
    """Loss and perplexity of a run on a whole split or, with --task, its scores and predictions."""
    from tqdm import tqdm

    from lm.data.dataset import open_split
    from lm.evaluation.loss import evaluate
    from lm.evaluation.task import check_task
    from lm.experiment import reads_records
    from lm.training.workdir import load_tokenizer

    if "data.tokenizer" in overrides:
        raise UserError("--config.data.tokenizer: a run is evaluated with its own tokenizer")
    if args.output and not args.task:
        raise UserError("--output is where --task writes its report: give both")
    experiment, params, step = _load_run(args, overrides)
    if args.task:
        check_task(experiment.config)
    tokenizer, data = load_tokenizer(Path(args.workdir)), experiment.config.data
    records = reads_records(experiment.config)
    stores = open_split(data, args.split, tokenizer, records, progress=True)
    if args.task:
        return _evaluate_task(args, experiment, params, step, tokenizer, stores)
    batches = experiment.evaluation_batches(tokenizer, stores)
    track = partial(tqdm, desc="evaluating", file=sys.stderr)
    result = evaluate(experiment, params, batches, stores, track=track)
    report = {"step": step, **{f"eval/{args.split}/{k}": v for k, v in result.items()}}
    _print_result(report, args.json)
    return 0


def _evaluate_task(
    args: argparse.Namespace, experiment: Any, params: Any, step: int, *of: Any
) -> int:
    from lm.evaluation.task import evaluate_task, write_report
    from lm.parallel.hosts import is_lead

    report, rows = evaluate_task(experiment, params, *of)
    report = {"step": step, "split": args.split, **report}
    folder = Path(args.output or Path(args.workdir) / "eval" / f"{args.split}-{step}")
    if is_lead():
        write_report(folder, report, rows)
        _print_result(report, args.json)
        print(f"report and predictions are in {folder}", file=sys.stderr)
    return 0


def generate(args: argparse.Namespace, overrides: Overrides) -> int:
    """Continue prompts, or make targets of sources, with a trained model."""
    from lm.decoding.prompts import reads_source
    from lm.decoding.sampling import Sampling
    from lm.decoding.test_set import write_file
    from lm.decoding.text import continuations, record, write
    from lm.training.checkpoints import checksums
    from lm.training.workdir import load_tokenizer

    _check_generate(args)
    if args.max_new_tokens is not None:
        overrides = overrides | {"decode.max_length": str(args.max_new_tokens)}
    experiment, params, step = _load_run(args, overrides, any_batch=True)
    config, model = experiment.config, experiment.model
    if not hasattr(model, "decode"):
        raise UserError(f"a model of the family {config.model.family} writes no text")
    if args.n_best > config.decode.beam_size:
        raise UserError(f"--n_best {args.n_best} needs --config.decode.beam_size={args.n_best}")
    tokenizer = load_tokenizer(Path(args.workdir))
    sampling = Sampling(0.0 if args.greedy else args.temperature, args.top_k, args.top_p)
    searches = reads_source(model) or config.decode.beam_size > 1
    if args.input:
        sampled = None if searches or args.greedy else sampling
        made_by = {"step": step, "weights": _digest(checksums(params))}
        files = Path(args.input), Path(args.output)
        write_file(experiment, params, tokenizer, *files, sampled, args.seed, args.n_best, made_by)
        return 0
    prompts = args.prompt or [""]
    if searches:
        found = write(experiment, params, tokenizer, prompts, None, args.seed)
        role = "source" if reads_source(model) else "prompt"
        records = [record(role, p, w, args.n_best) for p, w in zip(prompts, found, strict=True)]
        _print_records(records, args.json)
    else:
        steps = continuations(experiment, params, tokenizer, prompts, sampling, args.seed)
        _print_continuations(prompts, steps, args.json)
    return 0


def merge(args: argparse.Namespace, overrides: Overrides) -> int:
    """Write a run's parameters as a run of their own: low-rank updates merged, or an average."""
    from lm.training.merge import merge_run
    from lm.training.train import report

    merge_run(Path(args.workdir), Path(args.to), args.average, overrides, report)
    return 0


def import_model(args: argparse.Namespace, overrides: Overrides) -> int:
    """Make a run of a Hugging Face model folder, or of a .bin file of llama2.c."""
    from lm.training.interchange import import_run
    from lm.training.train import report

    import_run(Path(args.source), Path(args.workdir), overrides, report)
    return 0


def export(args: argparse.Namespace, overrides: Overrides) -> int:
    """Write a run as a folder that Hugging Face's transformers loads, tokenizer included."""
    from lm.training.interchange import export_run
    from lm.training.train import report

    if overrides:
        raise UserError(f"lm export takes no --config.{next(iter(overrides))}")
    export_run(Path(args.workdir), Path(args.to), args.average, args.best, args.dtype, report)
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
    if counts["active"] != counts["total"]:
        print(f"active {counts['active']:,}")
    print(f"total {counts['total']:,}")
    return 0


def plan(args: argparse.Namespace, overrides: Overrides) -> int:
    """Compile a configuration's training step for described devices: memory, work, time."""
    import jax

    from lm.planning.plan import make_plan
    from lm.planning.report import report
    from lm.planning.topologies import topology

    # What is planned for is described; the compilers need no device of this machine.
    jax.config.update("jax_platforms", "cpu")
    config = configs.load(args.config, overrides)
    if args.search:
        return _search(args, config)
    made = make_plan(config, topology(args.topology, args.slices), args.slices)
    print(json.dumps(made.as_json()) if args.json else report(made))
    return 0


def _search(args: argparse.Namespace, config: Any) -> int:
    from tqdm import tqdm

    from lm.planning.report import search_report
    from lm.planning.search import command_line, search

    track = partial(tqdm, desc="compiling", file=sys.stderr)
    workers = args.workers or os.cpu_count() or 1
    found = search(config, args.topology, args.slices, args.limit, workers, track)
    print(json.dumps(found.as_json()) if args.json else search_report(found))
    if args.output and found.ranked:
        Path(args.output).write_text(command_line(found.ranked[0][0]) + "\n")
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


def vectors(args: argparse.Namespace, overrides: Overrides) -> int:
    """Write the word vectors of a run or file, and score them by similarity and analogies."""
    from lm.data.word_vectors import load_vectors, save_vectors
    from lm.evaluation.vectors_report import run_vectors, scores
    from lm.training.workdir import load_tokenizer

    if bool(args.workdir) == bool(args.vectors):
        raise UserError("lm vectors: give either --workdir DIR or --vectors FILE")
    if args.workdir:
        _, parameters, _ = _load_run(args, overrides)
        found = run_vectors(parameters, load_tokenizer(Path(args.workdir)))
    else:
        found = load_vectors(args.vectors)
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        save_vectors(found, args.output)
    _print_result(scores(found, args.similarity, args.analogies), args.json)
    return 0


def report(args: argparse.Namespace, overrides: Overrides) -> int:
    """Write a page and pictures of a run, or of all runs in a folder."""
    from lm.reports.report import write_report

    _only_cpu(overrides)
    workdir = Path(args.workdir)
    print(write_report(workdir, Path(args.output or workdir / "report")))
    return 0


def scaling(args: argparse.Namespace, overrides: Overrides) -> int:
    """Fit a scaling law to runs: its optimum and forecast for a budget, with intervals."""
    from lm.scaling.runs import read_csv, read_workdir
    from lm.scaling.study import enough_tokens, study, text

    _only_cpu(overrides)
    if bool(args.workdir) == bool(args.runs):
        raise UserError("lm scaling: give either --workdir DIR or --runs FILE.csv")
    left_out: list[str] = []
    if args.runs:
        all_runs, folder = read_csv(Path(args.runs)), args.output
    else:
        all_runs, left_out = read_workdir(Path(args.workdir))
        folder = args.output or Path(args.workdir) / "scaling"
    runs = enough_tokens(all_runs, args.min_tokens_per_parameter)
    if len(runs) < len(all_runs):
        few = f"{len(all_runs) - len(runs)} runs of fewer than {args.min_tokens_per_parameter}"
        left_out.append(f"{few} tokens a parameter (--min_tokens_per_parameter)")
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    output = Path(folder) if folder else None
    found = study(runs, args.budget, args.resamples, args.seed, output)
    print(json.dumps(found) if args.json else text(found))
    if output:
        print(f"pictures are in {output}", file=sys.stderr)
    return 0


VERBS = {
    "train": train,
    "launch": launch,
    "sweep": sweep,
    "eval": evaluate,
    "generate": generate,
    "merge": merge,
    "import": import_model,
    "export": export,
    "params": params,
    "plan": plan,
    "config": show_config,
    "tokenizer train": train_tokenizer,
    "vectors": vectors,
    "report": report,
    "scaling": scaling,
}


def _only_cpu(overrides: Overrides) -> None:
    """For verbs that read what runs wrote, perhaps while these use the accelerator."""
    import jax

    if overrides:
        raise UserError(f"--config.{next(iter(overrides))}: this verb reads runs as they are")
    jax.config.update("jax_platforms", "cpu")


def _load_run(
    args: argparse.Namespace, overrides: Overrides, any_batch: bool = False
) -> tuple[Any, Any, int]:
    """The experiment, parameters and step of the run in --workdir, on all devices.

    With `any_batch` the run's batch sizes do not matter, and are made what the devices divide.
    """
    import jax

    from lm.experiment import build
    from lm.training.merge import PLAIN
    from lm.training.train import restore_params
    from lm.training.workdir import load_config

    one_copy_a_device = {
        f"parallel.mesh.{axis}": "1" for axis in ("slice", "fsdp", "expert", "tensor")
    }
    mesh = {"parallel.preset": "custom", "parallel.mesh.data": "-1"} | one_copy_a_device
    if any_batch:
        one_a_device = str(len(jax.devices()))
        mesh |= {"data.batch_size": one_a_device, "eval.batch_size": one_a_device}
        mesh |= {"train.microbatches": "1"}
    config = load_config(Path(args.workdir), PLAIN | mesh | overrides)
    experiment = build(config, jax.devices())
    parameters, step = restore_params(experiment, Path(args.workdir), args.average, args.best)
    return experiment, parameters, step


def _check_generate(args: argparse.Namespace) -> None:
    if bool(args.input) != bool(args.output):
        raise UserError("--input and --output go together")
    if args.input and (args.prompt or args.json):
        raise UserError("--input does not go with --prompt or --json; name --output FILE.jsonl")
    if args.n_best > 1 and not (args.json or str(args.output).endswith(".jsonl")):
        raise UserError("--n_best needs --json, or --output FILE.jsonl")


def _digest(values: dict) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _print_result(values: dict, as_json: bool) -> None:
    if as_json:
        print(json.dumps(values))
        return
    for name, value in values.items():
        print(f"{name} = {value:.6g}" if isinstance(value, float) else f"{name} = {value}")


def _print_records(records: list[dict], as_json: bool) -> None:
    if as_json:
        print(json.dumps(records))
        return
    for made in records:
        print(made.get("prompt", "") + made["text"])


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
    if chip := getattr(args, "xla_flags", None):
        from lm.parallel.xla_flags import apply

        apply(chip)
    devices = getattr(args, "cpu_devices", None)
    if args.function not in (show_config, train_tokenizer):  # these do without JAX
        from lm.parallel.platform import use_cpu_without_accelerators

        use_cpu_without_accelerators()
    if devices is not None:
        import jax

        if devices < 1:
            raise UserError(f"--cpu_devices {devices} is below 1")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
    if hasattr(args, "coordinator"):
        from lm.parallel.hosts import initialize

        initialize(args.coordinator, args.num_processes, args.process_id, args.heartbeat_seconds)


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
