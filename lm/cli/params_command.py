"""`lm params`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lm import config as configs
from lm.cli.arguments import (
    Overrides,
    Parser,
    config_argument,
    json_argument,
)
from lm.errors import UserError


def add_arguments(parser: Parser) -> None:
    """Add the verb's options."""
    config_argument(parser, required=False)
    parser.add_argument(
        "--all",
        nargs="?",
        const="experiments",
        metavar="DIR",
        help="every variant of every experiment file in DIR (experiments)",
    )
    json_argument(parser)


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run the verb; return the exit code."""
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
