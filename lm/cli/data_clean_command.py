"""`lm data clean`."""

from __future__ import annotations

import argparse
import json

from lm import config as configs
from lm.cli.arguments import Overrides, Parser, json_argument
from lm.cli.used_keys import ALL, Patterns


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "--config",
        nargs="+",
        default=[],
        metavar="FILE.py[:VARIANT]",
        help="also list outdated stores of the sources in these configurations, matched by name; "
        "give every configuration that has a source of such a name",
    )
    parser.add_argument(
        "--delete",
        action="store_true",
        help="delete the listed files; first stop runs that read an outdated store",
    )
    json_argument(parser)


def used_keys(args: argparse.Namespace) -> Patterns:
    """Return patterns of the configuration keys that the command uses."""
    return ALL if args.config else ("data.cache_directory",)


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run the command; return the exit code."""
    from lm.data.cleaning import find_unneeded
    from lm.experiment import record_columns

    given = [configs.load_config(spec, overrides) for spec in args.config]
    default = configs.default()
    for path, text in overrides.items() if not given else ():
        configs.set_value(default, path, configs.parse_value(path, text))
    data = [config.data for config in given or [default]]
    found = find_unneeded(data, [record_columns(config) for config in given])
    rows = []
    for each in found:
        if args.delete and not each.kept:
            each.remove()
        rows.append(
            {
                "folder": str(each.folder),
                "reason": each.reason,
                "bytes": each.n_bytes,
                "age_seconds": round(each.age),
                "kept": each.kept,
                "removed": args.delete and not each.kept,
            }
        )
        if not args.json:
            what = f"left alone, {each.kept}" if each.kept else each.reason
            size = f"{each.n_bytes:,} bytes, {each.age / 86400:.1f} days old"
            print(f"{each.folder}: {what} ({size})")
    if args.json:
        print(json.dumps(rows))
        return 0
    if not found:
        print("the cache has no unneeded folders")
        return 0
    free = [each for each in found if not each.kept]
    done = "removed" if args.delete else "not needed; --delete removes them"
    folders = "1 folder" if len(free) == 1 else f"{len(free)} folders"
    print(f"{folders}, {sum(each.n_bytes for each in free):,} bytes: {done}")
    return 0
