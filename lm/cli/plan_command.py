"""`lm plan`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
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

ROWS = "--serve: concurrent replies (default: as many as fit with full contexts)"
CONTEXT = "--serve: tokens of prompt and reply (default: the model's context length)"
LIMIT = "--search: maximum number of compiled candidates (default: 24)"
WORKERS = "--search: compiling processes (default: one per core)"
OPTIONS = {"search": ("limit", "workers", "output"), "serve": ("rows", "context")}


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    config_argument(parser)
    topology_arguments(parser)
    parser.add_argument(
        "--decode", action="store_true", help="plan a decoding step instead of a training step"
    )
    parser.add_argument("--serve", action="store_true", help="plan the engine of lm serve")
    parser.add_argument("--rows", type=at_least(1), metavar="N", help=ROWS)
    parser.add_argument("--context", type=at_least(1), metavar="N", help=CONTEXT)
    parser.add_argument(
        "--search",
        action="store_true",
        help="find the best mesh, rematerialization and microbatches",
    )
    parser.add_argument("--limit", type=at_least(1), metavar="N", help=LIMIT)
    parser.add_argument("--workers", type=at_least(0), metavar="N", help=WORKERS)
    parser.add_argument(
        "--output", metavar="FILE", help="--search: file for the overrides of the best candidate"
    )
    compiler_arguments(parser)
    json_argument(parser)


def used_keys(args: argparse.Namespace) -> Patterns:
    """Return patterns of the configuration keys that the command uses."""
    return ALL


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run the command; return the exit code."""
    modes = [name for name in ("decode", "serve", "search") if getattr(args, name)]
    if len(modes) > 1:
        raise UserError(f"--{modes[0]} and --{modes[1]} are different plans; give only one")
    for mode, names in OPTIONS.items():
        given = [name for name in names if getattr(args, name) is not None]
        if given and mode not in modes:
            raise UserError(f"--{given[0]} is an option of --{mode}")
    import jax

    from lm.tools.planning.topologies import topology

    # The target devices are only described; the compilers need no device of this machine.
    jax.config.update("jax_platforms", "cpu")
    config = configs.load_config(args.config, overrides)
    print_without_effect(config, overrides)
    if args.search:
        return _search(args, config)
    devices = topology(args.topology, args.slices)
    planned: Any
    text: Callable[[Any], str]
    if args.decode:
        from lm.tools.planning.decode_plan import decode_plan_text, plan_decoding

        planned, text = plan_decoding(config, devices), decode_plan_text
    elif args.serve:
        from lm.tools.planning.serve_plan import plan_serving, serve_plan_text

        planned = plan_serving(config, devices, args.rows, args.context or 0)
        text = serve_plan_text
    else:
        from lm.tools.planning.plan import make_plan
        from lm.tools.planning.plan_report import plan_text

        planned, text = make_plan(config, devices, args.slices), plan_text
    print(json.dumps(planned.as_json()) if args.json else text(planned))
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
