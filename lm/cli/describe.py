"""Verbs about configurations, before anything runs: params, plan, config, tokenizer train."""

from __future__ import annotations

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from lm import config as configs
from lm.cli.arguments import Overrides
from lm.config.schema import SCHEMA
from lm.errors import UserError


def params(args: argparse.Namespace, overrides: Overrides) -> int:
    """Count the parameters of a configuration, or of every variant of a folder's experiments."""
    if bool(args.config) == bool(args.all):
        raise UserError("lm params: give --config FILE.py[:VARIANT], or --all [DIR]")
    return _params_of_all(args, overrides) if args.all else _params_of_one(args, overrides)


def _params_of_one(args: argparse.Namespace, overrides: Overrides) -> int:
    import jax

    from lm.accounting.parameter_counts import count_parameters
    from lm.experiment import build

    experiment = build(configs.load(args.config, overrides), jax.devices()[:1])
    counts = {"config": args.config, "paper": experiment.config.paper}
    counts |= count_parameters(experiment)
    if args.json:
        print(json.dumps(counts))
        return 0
    for name, (shape, axes) in counts["tensors"].items():
        print(f"{name:45} {'×'.join(map(str, shape)):>20}  {' '.join(axes)}")
    if counts["heads"]:
        print(f"heads of pretraining, in none of the sums below {counts['heads']:,}")
    print(f"non-embedding {counts['non_embedding']:,}")
    if counts["active"] != counts["total"]:
        print(f"active {counts['active']:,}")
    print(f"total {counts['total']:,}")
    return 0


def _params_of_all(args: argparse.Namespace, overrides: Overrides) -> int:
    from tqdm import tqdm

    from lm.accounting.variant_sizes import variant_size
    from lm.config.experiment_file import variants_in

    specs = tqdm(variants_in(Path(args.all)), desc="counting", file=sys.stderr, disable=None)
    sizes = [variant_size(spec, overrides) for spec in specs]
    if args.json:
        print(json.dumps(sizes))
        return 0
    for size in sizes:
        counts = size["note"] or f"{size['total']:>17,} {size['non_embedding']:>17,}"
        print(f"{size['config']:45} {size['paper'] or '-':25} {counts}")
    return 0


def plan(args: argparse.Namespace, overrides: Overrides) -> int:
    """Compile a configuration's training step for described devices: memory, work, time."""
    import jax

    from lm.tools.planning.plan import make_plan
    from lm.tools.planning.plan_report import plan_text
    from lm.tools.planning.topologies import topology

    # What is planned for is described; the compilers need no device of this machine.
    jax.config.update("jax_platforms", "cpu")
    config = configs.load(args.config, overrides)
    if args.search:
        return _search(args, config)
    made = make_plan(config, topology(args.topology, args.slices), args.slices)
    print(json.dumps(made.as_json()) if args.json else plan_text(made))
    return 0


def _search(args: argparse.Namespace, config: Any) -> int:
    from tqdm import tqdm

    from lm.tools.planning.mesh_search import command_line, search_meshes
    from lm.tools.planning.plan_report import search_text

    track = partial(tqdm, desc="compiling", file=sys.stderr)
    workers = args.workers or os.cpu_count() or 1
    found = search_meshes(
        config, args.topology, args.slices, limit=args.limit, n_workers=workers, track=track
    )
    print(json.dumps(found.as_json()) if args.json else search_text(found))
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
    from lm.config.rules import listed
    from lm.data.sources import open_corpus
    from lm.data.tokenizers.sentencepiece import train_sentencepiece

    config = configs.default()
    config.data.source = args.source
    for path, text in overrides.items():
        configs.set_value(config, path, configs.parse_value(path, text))
    configs.validate(config)
    texts = (
        chunk.text
        for spec in listed(config.data.source)
        for chunk in open_corpus(spec, config.data, "train").chunks()
    )
    model = train_sentencepiece(texts, args.vocab_size, args.model_type)
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(model)
    print(f"{output}: {args.vocab_size} pieces; use --config.data.tokenizer=sentencepiece:{output}")
    return 0
