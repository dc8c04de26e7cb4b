"""`lm data build`."""

from __future__ import annotations

import argparse
import json

from lm import config as configs
from lm.cli.arguments import Overrides, Parser, config_argument, json_argument
from lm.cli.used_keys import ALL, Patterns


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    config_argument(parser)
    json_argument(parser)


def used_keys(args: argparse.Namespace) -> Patterns:
    """Return patterns of the configuration keys that the command uses."""
    return ALL


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run the command; return the exit code."""
    from lm.data.statistics import open_stores
    from lm.experiment import record_columns

    config = configs.load_config(args.config, overrides)
    _, stores = open_stores(config.data, record_columns(config), progress=not args.json)
    rows = [
        {
            "split": split,
            "source": store.manifest.source,
            "folder": str(store.directory),
            "tokens": store.n_tokens,
        }
        for split, store in stores
    ]
    if args.json:
        print(json.dumps(rows))
    for row in rows if not args.json else ():
        print("{split}: {source}: {tokens:,} tokens in {folder}".format(**row))
    return 0
