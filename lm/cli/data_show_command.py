"""`lm data show`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lm import config as configs
from lm.cli.arguments import Overrides, Parser, at_least, config_argument, json_argument
from lm.cli.used_keys import ALL, Patterns


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    config_argument(parser)
    parser.add_argument(
        "--samples", type=at_least(0), default=3, metavar="N", help="number of samples"
    )
    parser.add_argument(
        "--picture", metavar="FILE", help="plot lengths and token frequencies (.png or .svg)"
    )
    json_argument(parser)


def used_keys(args: argparse.Namespace) -> Patterns:
    """Return patterns of the configuration keys that the command uses."""
    return ALL


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run the command; return the exit code."""
    from lm.data.statistics import measure, open_stores
    from lm.experiment import record_columns

    config = configs.load_config(args.config, overrides)
    tokenizer, stores = open_stores(config.data, record_columns(config), progress=not args.json)
    found = [measure(split, store, tokenizer, args.samples) for split, store in stores]
    if args.picture:
        from lm.tools.reports.data_picture import draw_data

        draw_data(found, Path(args.picture))
    pieces = tokenizer.pieces() if found else []
    frequent = [
        {pieces[i]: int(each.counts[i]) for i in each.counts.argsort()[::-1][:10].tolist()}
        for each in found
    ]
    if args.json:
        names = ("split", "source", "folder", "n_shards", "sizes", "samples")
        rows = [
            {name: getattr(each, name) for name in names}
            | {"lengths": each.quantiles(), "frequent": tokens}
            for each, tokens in zip(found, frequent, strict=True)
        ]
        print(json.dumps(rows))
        return 0
    for each, tokens in zip(found, frequent, strict=True):
        _print(each, tokens)
    if args.picture:
        print(args.picture)
    return 0


def _print(found: Any, frequent: dict[str, int]) -> None:
    sizes = ", ".join(f"{value:,} {name}" for name, value in found.sizes.items())
    print(f"{found.split}: {found.source}: {sizes}; shards: {found.n_shards}; {found.folder}")
    for column, quantiles in found.quantiles().items():
        row = "  ".join(f"{name} {value:,}" for name, value in quantiles.items())
        print(f"  tokens of a {column}: {row}")
    print("  frequent: " + "  ".join(f"{piece!r} {n:,}" for piece, n in frequent.items()))
    for sample in found.samples:
        print(f"  > {sample!r}")
