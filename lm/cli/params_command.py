"""`lm params`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lm import config as configs
from lm.cli.arguments import (
    Overrides,
    Parser,
    config_argument,
    json_argument,
    topology_arguments,
)
from lm.cli.used_keys import ALL, Patterns, print_without_effect
from lm.errors import UserError


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    config_argument(parser, required=False)
    parser.add_argument(
        "--all",
        nargs="?",
        const="experiments",
        metavar="DIR",
        help="count every variant of every experiment file in DIR (default: experiments)",
    )
    topology_arguments(parser, required=False)
    json_argument(parser)


def used_keys(args: argparse.Namespace) -> Patterns:
    """Return patterns of the configuration keys that the command uses."""
    return ALL


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run the command; return the exit code."""
    if bool(args.config) == bool(args.all):
        raise UserError("lm params: give --config FILE.py[:VARIANT], or --all [DIR]")
    if args.all and args.topology:
        raise UserError("lm params: --topology goes with --config")
    return _params_of_all(args, overrides) if args.all else _params_of_one(args, overrides)


def _params_of_one(args: argparse.Namespace, overrides: Overrides) -> int:
    from lm.accounting.parameter_counts import count_parameters, parameter_table
    from lm.experiment import build

    config = configs.load_config(args.config, overrides)
    print_without_effect(config, overrides)
    experiment = build(config, _devices(args, config))
    mesh = {axis: size for axis, size in experiment.mesh.shape.items() if size > 1}
    counts = {"config": args.config, "paper": experiment.config.paper}
    counts |= count_parameters(experiment)
    table = parameter_table(experiment)
    bytes_per_device = sum(row["bytes"] for row in table)
    if args.json:
        sizes = {"mesh": mesh, "bytes_per_device": bytes_per_device}
        print(json.dumps({**counts, "parameters": table, **sizes}))
        return 0
    for row in table:
        shape, axes = "×".join(map(str, row["shape"])), " ".join(row["axes"])
        line = f"{row['name']:45} {shape:>20}  {axes:36} {row['role']:18}"
        if mesh:
            line += f" {_spec_text(row['spec']):30} {row['bytes']:>15,}"
        print(line.rstrip())
    if counts["heads"]:
        print(f"pretraining heads, not included in the sums below {counts['heads']:,}")
    print(f"non-embedding {counts['non_embedding']:,}")
    if counts["active"] != counts["total"]:
        print(f"active {counts['active']:,}")
    print(f"total {counts['total']:,}")
    if mesh:
        axes = ", ".join(f"{axis}={size}" for axis, size in mesh.items())
        print(f"bytes on each of {experiment.mesh.size} devices ({axes}) {bytes_per_device:,}")
    return 0


def _devices(args: argparse.Namespace, config: ConfigDict) -> Sequence[Any]:
    """Return the devices of --topology, or as many as the configuration's mesh needs."""
    import jax

    from lm.tools.planning.topologies import topology

    fixed = [size for size in config.parallel.mesh.values() if size > 0]
    n_devices = prod(fixed) if config.parallel.preset == "custom" else 1
    if not args.topology and n_devices == 1:
        return jax.devices()[:1]
    return topology(args.topology or f"cpu:{n_devices}", args.slices).devices


def _spec_text(spec: Sequence[Any]) -> str:
    names = ("+".join(axes) if isinstance(axes, tuple) else str(axes) for axes in spec)
    return f"({', '.join(names)})"


def _params_of_all(args: argparse.Namespace, overrides: Overrides) -> int:
    from lm.accounting.parameter_counts import variant_size
    from lm.config.experiment_file import variants_in
    from lm.progress import track

    specs = list(variants_in(Path(args.all)))
    shown = track(specs, len(specs), description="counting")
    sizes = [variant_size(spec, overrides) for spec in shown]
    if args.json:
        print(json.dumps(sizes))
        return 0
    for size in sizes:
        counts = size["note"] or f"{size['total']:>17,} {size['non_embedding']:>17,}"
        print(f"{size['config']:45} {size['paper'] or '-':25} {counts}")
    return 0
