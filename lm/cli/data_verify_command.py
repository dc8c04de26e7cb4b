"""`lm data verify`."""

from __future__ import annotations

import argparse
import json
import sys

from lm import config as configs
from lm.cli.arguments import Overrides, Parser, config_argument, json_argument
from lm.cli.used_keys import ALL, Patterns
from lm.errors import UserError


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    config_argument(parser, required=False)
    json_argument(parser)


def used_keys(args: argparse.Namespace) -> Patterns:
    """Return patterns of the configuration keys that the command uses."""
    return ALL if args.config else ("data.cache_directory",)


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run the command; return the exit code."""
    from lm.data.verification import verify_stores
    from lm.experiment import record_columns

    if args.config:
        config = configs.load_config(args.config, overrides)
    else:
        config = configs.default()
        for path, text in overrides.items():
            configs.set_value(config, path, configs.parse_value(path, text))
    columns = record_columns(config)
    reports = []
    for report in verify_stores(config.data, columns, of_config=bool(args.config)):
        reports.append(report)
        for problem in report.problems:
            print(f"{report.folder}: {problem}", file=sys.stderr)
        if not args.json and not report.problems:
            print(f"{report.folder}: {report.source}: {report.n_bytes:,} bytes verified")
    if args.json:
        rows = [{**vars(r), "folder": str(r.folder), "problems": list(r.problems)} for r in reports]
        print(json.dumps(rows))
    if not reports and not args.json:
        print("no stores yet: data are tokenized when a run starts")
    if damaged := [report for report in reports if report.problems]:
        first = damaged[0]
        remove = f"{first.folder}/{first.damaged}" if first.damaged else first.folder
        raise UserError(
            f"{len(damaged)} of {len(reports)} stores are damaged, the first at "
            f"{first.problems[0]}: remove {remove}, so that it is rebuilt"
        )
    return 0
