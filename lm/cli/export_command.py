"""`lm export`."""

from __future__ import annotations

import argparse

from lm.cli.arguments import (
    Overrides,
    Parser,
    at_least,
    weights_arguments,
    workdir_argument,
)
from lm.cli.used_keys import Patterns
from lm.errors import UserError
from lm.storage import open_run_folder

_FORMATS = ("huggingface", "stablehlo", "gguf")
_OF_STABLEHLO = ("platforms", "batch", "length", "context")


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    workdir_argument(parser)
    parser.add_argument("--to", required=True, metavar="DIR", help="folder for the files")
    parser.add_argument(
        "--format",
        choices=_FORMATS,
        default=_FORMATS[0],
        help="output format",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "q8_0"),
        help="dtype of the weights (default: float32; stablehlo: as in lm generate); q8_0: gguf",
    )
    parser.add_argument(
        "--quantize",
        choices=("int8", "int4"),
        help="quantize the layers' matrices (compressed-tensors, for transformers and vLLM)",
    )
    weights_arguments(parser)
    sizes = parser.add_argument_group("StableHLO programs")
    sizes.add_argument(
        "--platforms", metavar="NAMES", help="cpu, tpu, cuda, rocm (default: cpu,tpu,cuda)"
    )
    sizes.add_argument(
        "--batch", type=at_least(1), metavar="N", help="fixed batch size (default: dynamic)"
    )
    sizes.add_argument(
        "--length", type=at_least(1), metavar="N", help="fixed prompt length (default: dynamic)"
    )
    sizes.add_argument(
        "--context",
        type=at_least(1),
        metavar="N",
        help="length of the KV cache (default: the model's, or data.sequence_length)",
    )


def used_keys(args: argparse.Namespace) -> Patterns:
    """Return patterns of the configuration keys that the command uses."""
    return ("decode.weights", "decode.cache") if args.format == "stablehlo" else ()


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run the command; return the exit code."""
    from lm.parallel.mesh import print_on_primary_host as log

    if args.format != "stablehlo":
        for name in _OF_STABLEHLO:
            if getattr(args, name) is not None:
                raise UserError(f"--{name} is an option of --format stablehlo")
    if args.dtype == "q8_0" and args.format != "gguf":
        raise UserError("--dtype q8_0 is a type of --format gguf")
    if args.quantize and args.format != "huggingface":
        raise UserError("--quantize is an option of --format huggingface")
    folders = open_run_folder(args.workdir), open_run_folder(args.to)
    weights = args.average, args.best
    if args.format == "huggingface":
        from lm.interop.import_export import export_run

        export_run(*folders, *weights, args.dtype or "float32", log, args.quantize or "")
    elif args.format == "gguf":
        from lm.interop.gguf_export import export_gguf

        export_gguf(*folders, *weights, args.dtype or "float32", log)
    else:
        from lm.interop.stablehlo import PLATFORMS, Sizes, export_programs

        platforms = PLATFORMS[:3] if args.platforms is None else tuple(args.platforms.split(","))
        sizes = Sizes(platforms, args.batch, args.length, args.context)
        of_dtype = {"decode.weights": args.dtype} if args.dtype else {}
        export_programs(*folders, sizes, {**of_dtype, **overrides}, *weights, log)
    return 0
