"""`lm generate`."""

from __future__ import annotations

import argparse
import json
import os
import stat
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm.cli.arguments import (
    Overrides,
    Parser,
    at_least,
    check_texts,
    json_argument,
    open_run,
    process_arguments,
    sampling_arguments,
    weights_arguments,
    workdir_argument,
)
from lm.cli.used_keys import MODEL, Patterns
from lm.errors import UserError

if TYPE_CHECKING:
    from lm.decoding.guard import Guard


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    workdir_argument(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="prompt, or path of a recording; repeatable (default: standard input)",
    )
    parser.add_argument(
        "--input",
        metavar="FILE",
        help="file of prompts or sources, one per line, or .jsonl; for a speech model, a folder, "
        "glob or manifest of recordings",
    )
    parser.add_argument(
        "--output", metavar="FILE", help="one line per input, or .jsonl; continued if it exists"
    )
    parser.add_argument(
        "--n_best",
        type=at_least(1),
        default=1,
        metavar="N",
        help="hypotheses per input (--json or .jsonl)",
    )
    parser.add_argument("--chat", action="store_true", help="answer inputs as chat messages")
    parser.add_argument("--system", metavar="TEXT", help="--chat: system prompt")
    sampling_arguments(parser)
    parser.add_argument(
        "--best_of",
        type=at_least(1),
        metavar="N",
        help="draw N samples and keep the one with the highest reward",
    )
    parser.add_argument("--reward_model", metavar="DIR", help="--best_of: run of the reward model")
    weights_arguments(parser)
    json_argument(parser)
    process_arguments(parser)


def used_keys(args: argparse.Namespace) -> Patterns:
    """Return patterns of the configuration keys that the command uses."""
    read = ("sequence_length", "target_prefix", "n_mels", "columns", "header")
    return ("parallel.*", *MODEL, "decode.*", *(f"data.{name}" for name in read))


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run the command; return the exit code."""
    from lm.decoding.best_of import open_best_of
    from lm.decoding.chats import chat_of, chat_template
    from lm.decoding.generate_file import generate_file, weights_identity
    from lm.decoding.generated import generation_record
    from lm.decoding.generation import generate_texts, stream_continuations
    from lm.decoding.guard import open_guard
    from lm.decoding.prompts import input_role, is_encoder_decoder, require_text_output
    from lm.decoding.sampling import Sampling

    _check_generate(args)
    piped = "" if args.prompt or args.input else _piped_text()
    if args.max_new_tokens is not None:
        overrides = overrides | {"decode.max_length": str(args.max_new_tokens)}
    experiment, params, step = open_run(args, overrides, any_batch=True)
    config, model = experiment.config, experiment.model
    require_text_output(experiment)
    if args.n_best > max(config.decode.beam_size, args.best_of or 1):
        raise UserError(f"--n_best {args.n_best} needs --config.decode.beam_size={args.n_best}")
    tokenizer = experiment.tokenizer
    sampling = Sampling(0.0 if args.greedy else args.temperature, args.top_k, args.top_p)
    template = chat_template(experiment) if args.chat else None
    guard = open_guard(config.decode)
    searches = is_encoder_decoder(model) or config.decode.beam_size > 1
    if args.best_of and searches:
        raise UserError("--best_of selects among samples, but beam search does not sample")
    best_of = open_best_of(args.best_of, args.reward_model) if args.best_of else None
    if args.input:
        sampled = None if searches or args.greedy else sampling
        made_by = weights_identity(params, step)
        files = Path(args.input), Path(args.output)
        seed, n_best, stop = args.seed, args.n_best, args.stop
        common = experiment, params, tokenizer, *files
        of_chat: Any = {"template": template, "system": args.system}
        generate_file(*common, sampled, seed, n_best, made_by, stop, best_of, **of_chat)
        _print_guard(guard)
        return 0
    prompts = args.prompt or [piped]
    inputs: Sequence[Any] = prompts
    if template:
        inputs = [chat_of({"prompt": prompt}, args.system) for prompt in prompts]
    if searches or guard or best_of:  # guards and reward models judge complete outputs
        sampled = None if searches else sampling
        options: Any = {"stop": args.stop, "best_of": best_of, "template": template}
        found = generate_texts(experiment, params, tokenizer, inputs, sampled, args.seed, **options)
        role = input_role(model)
        records = [
            generation_record(role, prompt, generations, args.n_best)
            for prompt, generations in zip(prompts, found, strict=True)
        ]
        _print_records(records, args.json, repeats=not template)
        _print_guard(guard)
    else:
        steps = stream_continuations(
            experiment, params, tokenizer, inputs, sampling, args.seed, args.stop, template
        )
        _print_continuations(prompts, steps, args.json, repeats=not template)
    return 0


def _print_guard(guard: Guard | None) -> None:
    from lm.parallel.mesh import print_on_primary_host

    if guard:
        print_on_primary_host(guard.summary())


def _piped_text() -> str:
    """Return the text piped into stdin, without its last newline; "" if there is none.

    Not read with several processes, because each would get different text.
    """
    import jax

    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, ValueError, OSError):  # closed, or not a file
        return ""
    if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode)) or jax.process_count() > 1:
        return ""
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"stdin: not UTF-8 at byte {error.start}") from None
    return text.removesuffix("\n").removesuffix("\r")


def _check_generate(args: argparse.Namespace) -> None:
    if bool(args.input) != bool(args.output):
        raise UserError("--input and --output must be given together")
    if args.input and (args.prompt or args.json):
        raise UserError(
            "--input cannot be combined with --prompt or --json; name --output FILE.jsonl"
        )
    if args.system is not None and not args.chat:
        raise UserError("--system needs --chat")
    check_texts([*(args.prompt or ()), *args.stop, args.system or ""])
    if bool(args.best_of) != bool(args.reward_model):
        raise UserError("--best_of and --reward_model must be given together")
    if args.best_of and args.greedy:
        raise UserError("--best_of selects among samples: omit --greedy")
    if "" in args.stop:
        raise UserError("--stop is empty: every continuation would be empty")
    if args.n_best > 1 and not (args.json or str(args.output).endswith(".jsonl")):
        raise UserError("--n_best needs --json, or --output FILE.jsonl")


def _print_records(records: list[dict], as_json: bool, repeats: bool) -> None:
    """Print records, preceded by their prompts if `repeats`."""
    if as_json:
        print(json.dumps(records))
        return
    for made in records:
        print((made.get("prompt", "") if repeats else "") + made["text"])


def _print_continuations(
    prompts: Sequence[str], steps: Iterable[list[str]], as_json: bool, repeats: bool
) -> None:
    """Stream the continuation of a single prompt; print several ones complete, in order.

    Args:
        prompts: the prompts.
        steps: new texts of each prompt.
        as_json: print records.
        repeats: print prompts before their continuations.
    """
    shown = prompts if repeats else [""] * len(prompts)
    streams = len(prompts) == 1 and not as_json
    texts, unprinted = [""] * len(prompts), shown[0]
    for parts in steps:
        texts = [text + part for text, part in zip(texts, parts, strict=True)]
        if streams:
            print(unprinted + parts[0], end="", flush=True)
            unprinted = ""
    if streams:
        print(unprinted)
    elif as_json:
        print(json.dumps([{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)]))
    else:
        for number, (prompt, text) in enumerate(zip(shown, texts, strict=True), 1):
            print(f"--- {number}\n{prompt}{text}")
