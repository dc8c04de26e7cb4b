"""`lm probe`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from lm.cli.arguments import (
    Overrides,
    Parser,
    at_least,
    json_argument,
    open_run,
    weights_arguments,
    workdir_argument,
)
from lm.cli.used_keys import MESH, MODEL, Patterns


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    workdir_argument(parser)
    labels = "records with text and label, or words and tags: tsv:FILE, csv:, jsonl:, conll:"
    parser.add_argument("--labels", required=True, metavar="SOURCE", help=labels)
    held_out = "records to test on (default: every fifth record of --labels)"
    parser.add_argument("--held_out", metavar="SOURCE", help=held_out)
    parser.add_argument(
        "--seed", type=at_least(0), default=0, metavar="N", help="random seed of the control task"
    )
    weights_arguments(parser)
    json_argument(parser)


def used_keys(args: argparse.Namespace) -> Patterns:
    """Return patterns of the configuration keys that the command uses."""
    records = ("columns", "header", "bad_rows", "directory", "cache_directory")
    return (*MESH, *MODEL, *(f"data.{key}" for key in records))


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run the command; return the exit code."""
    from lm.insight.probes import probe
    from lm.tools.formatting import plain_text, text_table

    experiment, params, _ = open_run(args, overrides, any_batch=True, heads_optional=True)
    report = probe(experiment, params, args.labels, args.held_out, args.seed)
    if args.json:
        layers = [asdict(score) | {"selectivity": score.selectivity} for score in report.layers]
        print(json.dumps(asdict(report) | {"layers": layers}))
        return 0
    print(f"{len(report.classes)} classes, {report.n_train:,} fitted, {report.n_held_out:,} scored")
    print(f"most frequent class: {report.majority:.1f}")
    rows = [
        (
            str(score.layer) if score.layer else "embedding",
            *(f"{x:.1f}" for x in (score.accuracy, score.control, score.selectivity)),
        )
        for score in report.layers
    ]
    columns = ("layer", "accuracy", "control", "selectivity")
    print(plain_text(text_table(rows, columns, right=(1, 2, 3))))
    return 0
