"""Command line `lm COMMAND …`, one module per command.

Each has `add_arguments(parser)`, `used_keys(args)` and `run(args, overrides)`. User errors are one
line, with exit code 2. Read `main`, then `arguments.py`.
"""

from __future__ import annotations

import argparse
import errno
import io
import locale
import os
import signal
import sys
import traceback
from collections.abc import Sequence

from lm.cli.arguments import parse
from lm.errors import LostPeerError, UserError

# Help text of each command; lm/cli/VERB_command.py is imported when it is used.
VERBS = {
    "train": "Train a model, or continue the run in --workdir.",
    "launch": "Run a command as several processes on this host; if one dies, restart them all.",
    "sweep": "Train every run of a sweep file, or continue the sweep.",
    "eval": "Evaluate a run: loss and perplexity, task scores, lm-eval, code or safety.",
    "score": "Write the log-likelihood of every token of given continuations.",
    "generate": "Generate continuations of prompts, or targets of sources.",
    "serve": "Serve runs over OpenAI's HTTP API.",
    "chat": "Chat with a model in the terminal.",
    "compare": "Compare samples of two runs blind: write the page, or compute the win rate.",
    "inspect": "Write a page of attention maps, logit lens and attributions of prompts.",
    "probe": "Fit linear probes to the hidden states of every layer, with a control task.",
    "merge": "Write a new run with LoRA updates merged, or with averaged checkpoints.",
    "import": "Convert a Hugging Face model folder, or a .bin file of llama2.c, to a run.",
    "export": "Convert a run to a Hugging Face model folder, StableHLO programs or GGUF.",
    "params": "Count the parameters of a configuration, or of all experiments in a folder.",
    "plan": "Compile the training step for given devices: memory, FLOPs, communication, time.",
    "config": "Print a resolved configuration, or with --keys a description of every key.",
    "tokenizer train": "Train a SentencePiece tokenizer on a corpus.",
    "corpus": "Filter and deduplicate a corpus; write shards and a data card.",
    "data build": "Tokenize the data of a configuration; several processes share the work.",
    "data show": "Print sizes, lengths and samples of the data of a configuration.",
    "data clean": "List unused files of the data cache; --delete removes them.",
    "data verify": "Verify the checksums of a configuration's token stores, or of the whole cache.",
    "vectors": "Write word vectors; score them on similarities and analogies.",
    "report": "Write a page with the curves of one or several runs.",
    "scaling": "Fit a scaling law to runs; predict the best model for a compute budget.",
}
WITHOUT_JAX = ("config", "corpus", "tokenizer")
# Errors of a file or folder that cannot be opened or created under the given name.
_FILE_ERRORS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR),
    *(errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
)


def _set_up_jax(args: argparse.Namespace) -> None:
    from absl import logging

    # Orbax logs the traceback of errors that it also raises.
    logging.set_verbosity(logging.FATAL)
    if chip := getattr(args, "xla_flags", None):
        from lm.hardware import set_xla_flags

        set_xla_flags(chip)
    if folder := getattr(args, "dump_hlo", None):
        from lm.hardware import dump_programs

        dump_programs(folder)
    devices = getattr(args, "cpu_devices", None)
    if args.verb not in WITHOUT_JAX:
        from lm.parallel.hosts import use_cpu_without_accelerators

        use_cpu_without_accelerators()
    if devices is not None:
        import jax

        if devices < 1:
            raise UserError(f"--cpu_devices {devices} is below 1")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
        if devices > 1:
            # Cached CPU programs do not order collectives, and deadlock with few threads.
            os.environ.setdefault("PJRT_NPROC", str(max(4 * devices, os.cpu_count() or 1)))
    if hasattr(args, "coordinator"):
        from lm.parallel.hosts import initialize_distributed

        initialize_distributed(
            args.coordinator, args.num_processes, args.process_id, args.heartbeat_seconds
        )


def _run(arguments: Sequence[str]) -> int:
    try:
        args, overrides = parse(arguments, VERBS)
        for number in getattr(args.module, "IGNORED_SIGNALS", ()):  # until the command handles them
            signal.signal(number, signal.SIG_IGN)
        from lm.cli.used_keys import require_used  # not needed by `lm --help`

        require_used(args.verb, args.module.used_keys(args), overrides)
        _set_up_jax(args)
        from lm.storage import local_copies

        with local_copies():
            return args.module.run(args, overrides)
    except UserError as error:
        message = str(error)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  so that the exit does not fail either
        return 0
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"the disk is full: {error.filename or error}"
        elif error.errno in _FILE_ERRORS and error.filename is not None:
            message = f"{error.filename}: {error.strerror}"
        else:
            raise
    except KeyboardInterrupt:
        return 130
    print(f"error: {_shortened(' '.join(message.split()))}", file=sys.stderr)
    return 2


def _shortened(line: str, longest: int = 1000) -> str:
    """Shorten a long line in the middle, as it may contain a value from a damaged file."""
    half = longest // 2
    return line if len(line) <= longest else f"{line[:half]} … {line[-half:]}"


def _use_utf8() -> None:
    """Restart in Python's UTF-8 mode under other locales; escape unprintable output.

    So file names, and files opened without an explicit encoding, do not depend on the locale.
    """
    others = {sys.getfilesystemencoding(), locale.getencoding().lower()} - {"utf-8"}
    if (
        others
        and sys.executable
        and not (sys.flags.utf8_mode or os.environ.get("PYTHONUTF8") == "1")
    ):
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not if it is closed
            stream.reconfigure(errors="backslashreplace")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code: 0 done, 2 user error, 75 stopped and resumable."""
    if arguments is None:
        _use_utf8()
    try:
        code = _run(sys.argv[1:] if arguments is None else arguments)
    except LostPeerError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except Exception as error:
        from lm.parallel.hosts import lost_peer

        if line := lost_peer(error):
            print(f"error: {line}", file=sys.stderr)
        else:
            traceback.print_exc()
        code = 1
    if code:
        from lm.parallel.hosts import exit_at_once

        exit_at_once(code)
    return code
