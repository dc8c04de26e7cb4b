"""`lm VERB …`: what all verbs share. Errors of the user are one line and exit code 2."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Sequence

from lm.cli.arguments import parse
from lm.cli.describe import params, plan, show_config, train_tokenizer
from lm.cli.evaluate import evaluate, vectors
from lm.cli.generate import generate
from lm.cli.report import report, scaling
from lm.cli.train import export, import_model, launch, merge, sweep, train
from lm.errors import UserError
from lm.storage import local_copies

VERBS = {
    "train": train,
    "launch": launch,
    "sweep": sweep,
    "eval": evaluate,
    "generate": generate,
    "merge": merge,
    "import": import_model,
    "export": export,
    "params": params,
    "plan": plan,
    "config": show_config,
    "tokenizer train": train_tokenizer,
    "vectors": vectors,
    "report": report,
    "scaling": scaling,
}


def _set_up_jax(args: argparse.Namespace) -> None:
    from absl import logging

    # Orbax logs the traceback of what it raises; the error itself comes to us.
    logging.set_verbosity(logging.FATAL)
    if chip := getattr(args, "xla_flags", None):
        from lm.parallel.xla_flags import set_xla_flags

        set_xla_flags(chip)
    devices = getattr(args, "cpu_devices", None)
    if args.function not in (show_config, train_tokenizer):  # these do without JAX
        from lm.parallel.hosts import use_cpu_without_accelerators

        use_cpu_without_accelerators()
    if devices is not None:
        import jax

        if devices < 1:
            raise UserError(f"--cpu_devices {devices} is below 1")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
    if hasattr(args, "coordinator"):
        from lm.parallel.hosts import initialize_distributed

        initialize_distributed(
            args.coordinator, args.num_processes, args.process_id, args.heartbeat_seconds
        )


def _run(arguments: Sequence[str]) -> int:
    try:
        args, overrides = parse(arguments, VERBS)
        _set_up_jax(args)
        with local_copies():
            return args.function(args, overrides)
    except UserError as error:
        message = str(error)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  so that the exit does not fail too
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = f"the disk is full: {error.filename or error}"
    except KeyboardInterrupt:
        return 130
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code: 0 done, 2 an error of the user's, 75 stopped and resumable."""
    try:
        code = _run(sys.argv[1:] if arguments is None else arguments)
    except Exception:
        traceback.print_exc()
        code = 1
    if code in (1, 2):
        from lm.parallel.hosts import exit_at_once

        exit_at_once(code)
    return code
