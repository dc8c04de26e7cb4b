"""`lm plan`."""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from lm import config as configs
from lm.cli.arguments import (
    Overrides,
    Parser,
    at_least,
    compiler_arguments,
    config_argument,
    json_argument,
    topology_arguments,
)
from lm.cli.used_keys import ALL, Patterns, print_without_effect
from lm.errors import UserError

LIMIT = "--search: most candidates that are compiled; 24"
WORKERS = "--search: compiling processes; 0: one a core"


def add_arguments(parser: Parser) -> None:
    """Add the verb's options."""
    config_argument(parser)
    topology_arguments(parser)
    parser.add_argument("--decode", action="store_true", help="a step of decoding, not of training")
    parser.add_argument("--search", action="store_true", help="rank meshes, remat, microbatches")
    parser.add_argument("--limit", type=at_least(1), metavar="N", help=LIMIT)
    parser.add_argument("--workers", type=at_least(0), metavar="N", help=WORKERS)
    parser.add_argument("--output", metavar="FILE", help="--search: the winner's overrides")
    compiler_arguments(parser)
    json_argument(parser)


def used_keys(args: argparse.Namespace) -> Patterns:
    """Return patterns of the configuration keys that the verb uses."""
    return ALL


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run the verb; return the exit code."""
    for name in ("limit", "workers", "output"):
        if getattr(args, name) is not None and not args.search:
            raise UserError(f"--{name} is an option of --search")
    import jax

    from lm.tools.planning.plan import make_plan
    from lm.tools.planning.plan_report import plan_text
    from lm.tools.planning.topologies import topology

    # What is planned for is described; the compilers need no device of this machine.
    jax.config.update("jax_platforms", "cpu")
    config = configs.load_config(args.config, overrides)
    print_without_effect(config, overrides)
    if args.decode:
        from lm.tools.planning.decode_plan import decode_plan_text, plan_decoding

        if args.search:
            raise UserError("--search ranks meshes for training; leave out --decode")
        planned = plan_decoding(config, topology(args.topology, args.slices))
        print(json.dumps(planned.as_json()) if args.json else decode_plan_text(planned))
        return 0
    if args.search:
        return _search(args, config)
    made = make_plan(config, topology(args.topology, args.slices), args.slices)
    print(json.dumps(made.as_json()) if args.json else plan_text(made))
    return 0


def _search(args: argparse.Namespace, config: Any) -> int:
    from lm.progress import track
    from lm.tools.planning.mesh_search import command_line, search_meshes
    from lm.tools.planning.plan_report import search_text

    shown = partial(track, description="compiling")
    workers = args.workers or os.cpu_count() or 1
    found = search_meshes(
        config, args.topology, args.slices, limit=args.limit or 24, n_workers=workers, track=shown
    )
    print(json.dumps(found.as_json()) if args.json else search_text(found))
    if args.output and found.ranked:
        Path(args.output).write_text(command_line(found.ranked[0][0]) + "\n")
    return 0
