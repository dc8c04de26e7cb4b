"""`lm config`."""

from __future__ import annotations

import argparse
import json

from lm import config as configs
from lm.cli.arguments import (
    Overrides,
    Parser,
    config_argument,
    json_argument,
)
from lm.cli.used_keys import ALL, Patterns, print_without_effect
from lm.config.registries import SCHEMA
from lm.errors import UserError


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    config_argument(parser, required=False)
    parser.add_argument("--keys", action="store_true", help="describe every key")
    json_argument(parser)


def used_keys(args: argparse.Namespace) -> Patterns:
    """Return patterns of the configuration keys that the command uses."""
    return ALL if args.config else ()


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run the command; return the exit code."""
    config = configs.load_config(args.config, overrides) if args.config else None
    if args.keys:  # including keys of plug-ins that the configuration imports
        for path, key in SCHEMA.items():
            choices = f" [{', '.join(key.choices)}]" if key.choices else ""
            print(f"{path} = {key.default!r}\n    {key.help}{choices}")
        return 0
    if config is None:
        raise UserError("lm config: give --config FILE.py[:VARIANT], or --keys")
    print_without_effect(config, overrides)
    if args.json:
        print(json.dumps(dict(configs.flatten(config))))
    else:
        for path, value in configs.flatten(config):
            print(f"{path} = {value!r}")
    return 0
