"""`lm serve`."""

from __future__ import annotations

import argparse
import signal
from functools import partial
from pathlib import Path

from lm.cli.arguments import (
    Overrides,
    Parser,
    at_least,
    device_arguments,
    positive,
    weights_arguments,
)
from lm.cli.used_keys import MODEL, Patterns
from lm.errors import UserError, missing_package

IGNORED_SIGNALS = (signal.SIGHUP,)  # the newest checkpoint is loaded afterwards anyway


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "--workdir",
        required=True,
        action="append",
        metavar="[NAME=]DIR",
        help="run to serve; repeatable; NAME defaults to the folder's name",
    )
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="LoRA run on top of the first --workdir, served as a model of its own; repeatable",
    )
    weights_arguments(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all interfaces"
    )
    parser.add_argument(
        "--port", type=at_least(0), default=8000, help="port to listen on; 0: any free port"
    )
    parser.add_argument(
        "--api_keys", metavar="FILE", default="", help="file of API keys, one per line"
    )
    parser.add_argument(
        "--ssl_certfile", metavar="FILE", default="", help="certificate; serves HTTPS"
    )
    key = "private key of the certificate"
    parser.add_argument("--ssl_keyfile", metavar="FILE", default="", help=key)
    parser.add_argument(
        "--rows", type=at_least(1), default=32, help="replies generated concurrently"
    )
    parser.add_argument(
        "--context",
        type=at_least(0),
        default=0,
        metavar="N",
        help="maximum tokens of prompt and reply; 0: the model's context length",
    )
    parser.add_argument(
        "--pages",
        type=at_least(0),
        default=0,
        metavar="N",
        help="KV cache pages; 0: as many as fit in memory",
    )
    parser.add_argument(
        "--speculate",
        type=at_least(0),
        default=0,
        metavar="N",
        help="speculative decoding: tokens proposed per step; 0: off",
    )
    parser.add_argument(
        "--draft", metavar="DIR", default="", help="run of the draft model (default: prompt lookup)"
    )
    parser.add_argument(
        "--queue", type=at_least(0), default=256, help="replies that may wait, per model"
    )
    parser.add_argument(
        "--max_prompt_tokens",
        type=at_least(1),
        default=2**20,
        metavar="N",
        help="maximum tokens per prompt",
    )
    parser.add_argument(
        "--max_new_tokens",
        type=at_least(1),
        default=4096,
        metavar="N",
        help="maximum tokens per reply",
    )
    parser.add_argument(
        "--max_choices",
        type=at_least(1),
        default=128,
        metavar="N",
        help="maximum replies per request",
    )
    parser.add_argument(
        "--request_seconds",
        type=positive,
        default=600.0,
        metavar="S",
        help="time limit of a request",
    )
    parser.add_argument(
        "--drain_seconds",
        type=positive,
        default=600.0,
        metavar="S",
        help="seconds to finish requests after SIGTERM",
    )
    parser.add_argument(
        "--reload_every",
        type=at_least(0.0),
        default=0.0,
        metavar="S",
        help="seconds between checks for a newer checkpoint; 0: only on SIGHUP",
    )
    parser.add_argument("--log_texts", action="store_true", help="log prompts and replies")
    device_arguments(parser)


def used_keys(args: argparse.Namespace) -> Patterns:
    """Return patterns of the configuration keys that the command uses."""
    return ("parallel.*", *MODEL, "decode.*", "data.sequence_length")


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run the command; return the exit code."""
    from lm.decoding.engine.sizes import EngineOptions

    try:
        from lm.serving.app import ServerOptions, log_note
        from lm.serving.http_server import ListenOptions, serve
        from lm.serving.sampling_parameters import RequestLimits
        from lm.serving.served_models import WeightsChoice, open_models
    except ImportError as error:
        if (error.name or "").startswith("lm."):
            raise
        raise missing_package("lm serve", error.name or "starlette", "serve") from error

    if args.ssl_keyfile and not args.ssl_certfile:
        raise UserError("--ssl_keyfile needs --ssl_certfile")
    weights = WeightsChoice(args.average, args.best)
    if args.draft and not args.speculate:
        raise UserError("--draft needs --speculate N, the number of proposed tokens")
    sizes = EngineOptions(args.rows, args.context, n_pages=args.pages, n_proposed=args.speculate)
    places = _places([*args.workdir, *args.adapter])
    adapters = {name: places.pop(name) for name in list(_places(args.adapter))}
    load = partial(open_models, places, weights, overrides, sizes, log_note, adapters, args.draft)
    limits = RequestLimits(args.max_prompt_tokens, args.max_new_tokens, args.max_choices)
    options = ServerOptions(limits, args.queue, args.request_seconds, log_texts=args.log_texts)
    listen = ListenOptions(
        *(args.host, args.port, args.ssl_certfile, args.ssl_keyfile, args.api_keys),
        *(args.drain_seconds, args.reload_every),
    )
    serve(load, options, listen)
    return 0


def _places(workdirs: list[str]) -> dict[str, str]:
    """Return workdirs by model name."""
    places: dict[str, str] = {}
    for given in workdirs:
        name, equals, workdir = given.partition("=")
        if not equals or "/" in name:
            name, workdir = Path(given.rstrip("/")).name, given
        if not name or places.setdefault(name, workdir) != workdir:
            raise UserError(f"{given}: each model needs a unique name: NAME=DIR")
    return places
