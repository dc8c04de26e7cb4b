"""The verb generate: texts that a run writes."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

from lm.cli.arguments import Overrides
from lm.cli.open_run import open_run
from lm.cli.printing import print_continuations, print_records
from lm.errors import UserError
from lm.storage import open_run_folder


def generate(args: argparse.Namespace, overrides: Overrides) -> int:
    """Continue prompts, or make targets of sources, with a trained model."""
    from lm.decoding.generate_file import write_file
    from lm.decoding.generation import continuations, record, write
    from lm.decoding.prompts import is_encoder_decoder
    from lm.decoding.sampling import Sampling
    from lm.runs.checkpoints import checksums
    from lm.runs.workdir import load_tokenizer

    _check_generate(args)
    if args.max_new_tokens is not None:
        overrides = overrides | {"decode.max_length": str(args.max_new_tokens)}
    experiment, params, step = open_run(args, overrides, any_batch=True)
    config, model = experiment.config, experiment.model
    if not hasattr(model, "decode"):
        raise UserError(f"a model of the family {config.model.family} writes no text")
    if args.n_best > config.decode.beam_size:
        raise UserError(f"--n_best {args.n_best} needs --config.decode.beam_size={args.n_best}")
    tokenizer = load_tokenizer(open_run_folder(args.workdir))
    sampling = Sampling(0.0 if args.greedy else args.temperature, args.top_k, args.top_p)
    searches = is_encoder_decoder(model) or config.decode.beam_size > 1
    if args.input:
        sampled = None if searches or args.greedy else sampling
        made_by = {"step": step, "weights": _digest(checksums(params))}
        files = Path(args.input), Path(args.output)
        write_file(experiment, params, tokenizer, *files, sampled, args.seed, args.n_best, made_by)
        return 0
    prompts = args.prompt or [""]
    if searches:
        found = write(experiment, params, tokenizer, prompts, None, args.seed)
        role = "source" if is_encoder_decoder(model) else "prompt"
        records = [record(role, p, w, args.n_best) for p, w in zip(prompts, found, strict=True)]
        print_records(records, args.json)
    else:
        steps = continuations(experiment, params, tokenizer, prompts, sampling, args.seed)
        print_continuations(prompts, steps, args.json)
    return 0


def _check_generate(args: argparse.Namespace) -> None:
    if bool(args.input) != bool(args.output):
        raise UserError("--input and --output go together")
    if args.input and (args.prompt or args.json):
        raise UserError("--input does not go with --prompt or --json; name --output FILE.jsonl")
    if args.n_best > 1 and not (args.json or str(args.output).endswith(".jsonl")):
        raise UserError("--n_best needs --json, or --output FILE.jsonl")


def _digest(values: dict) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
