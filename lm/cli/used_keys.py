"""Configuration keys that each verb uses; any other `--config.a.b` on its command line is an error.

A verb's module declares them by `used_keys(args)`: patterns of dotted paths, where "-" before a
pattern takes keys out again.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from lm import config as configs
from lm.config.registries import SCHEMA
from lm.errors import UserError

Patterns = tuple[str, ...]

ALL: Patterns = ("*",)
# Mesh of this process, and what has to be divisible by it.
MESH: Patterns = ("parallel.*", "data.batch_size", "eval.batch_size", "train.microbatches")
# What a trained model computes: not how it starts, and nothing that only training does.
MODEL: Patterns = (
    "model.*",
    "-model.init*",
    "-model.scale_residual_init",
    "-model.*dropout",
    "-model.router_jitter",
    "-model.router_bias_rate",
    "-model.expert_capacity",
    "train.loss_chunk",
    "train.scan_unroll",
)


def is_used(path: str, used: Patterns) -> bool:
    """Return whether patterns cover a key; the last one that matches it decides."""
    found = False
    for pattern in used:
        if fnmatchcase(path, pattern.removeprefix("-")):
            found = not pattern.startswith("-")
    return found


def require_used(verb: str, used: Patterns, overrides: Iterable[str]) -> None:
    """Raise UserError for a key that a verb does not use, or that does not exist.

    Args:
        verb: name of the verb, for the message.
        used: patterns of the keys that it uses.
        overrides: dotted paths of the command line.
    """
    for path in overrides:
        if is_used(path, used):
            continue
        configs.require_key(path)
        raise UserError(f"--config.{path}: lm {verb} does not use this key; {_shown(path, used)}")


def _shown(path: str, used: Patterns) -> str:
    """Return what is used instead of a key: the keys of its section, the names of others."""
    keys = [known for known in SCHEMA if is_used(known, used)]
    if not keys:
        return "it reads what it is given as it is"
    section = path.partition(".")[0]
    near = [known for known in keys if known.partition(".")[0] == section]
    others = dict.fromkeys(known.partition(".")[0] for known in keys if known not in near)
    return "it uses " + ", ".join([*near, *(f"{o}.*" if o != "seed" else o for o in others)])
