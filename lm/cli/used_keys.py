"""Configuration keys that each command uses; other `--config.a.b` overrides are errors.

A command's module declares them by `used_keys(args)`: patterns of dotted paths, where a leading "-"
excludes keys again. A key that a command uses may still have no effect, such as an option of an
optimizer that is not selected: the command says so and continues.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from ml_collections import ConfigDict

from lm import config as configs
from lm.config.registries import MIXERS, MODELS, REGISTRIES, SCHEMA
from lm.config.registry import config_value
from lm.errors import UserError

Patterns = tuple[str, ...]

ALL: Patterns = ("*",)
# Mesh of this process, and everything that must be divisible by it.
MESH: Patterns = ("parallel.*", "data.batch_size", "eval.batch_size", "train.microbatches")
# What a trained model computes, without initialization and training options.
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
# Reading data that are not trained on, without mixtures and overlapping windows. Each command has
# its own source options; data.tokenizer has its own error.
READING: Patterns = (
    "data.*",
    "-data.tokenizer_*",
    "-data.added_tokens",
    "-data.chat_*",
    "-data.lowercase",
    "-data.weights",
    "-data.schedule",
    "-data.epochs",
    "-data.*_ramp",
    "-data.canar*",
    "-data.stride",
    "-data.prefetch",
    "-data.split",
    "-data.source",
    "-data.test_source",
    "-data.validation_*",
    "objective.*",
    "seed",
)


def is_used(path: str, used: Patterns) -> bool:
    """Return whether patterns match a key; the last matching pattern decides."""
    found = False
    for pattern in used:
        if fnmatchcase(path, pattern.removeprefix("-")):
            found = not pattern.startswith("-")
    return found


def require_used(verb: str, used: Patterns, overrides: Iterable[str]) -> None:
    """Raise UserError for a key that a command does not use, or that does not exist.

    Args:
        verb: name of the command, for the message.
        used: patterns of the keys that it uses.
        overrides: dotted paths from the command line.
    """
    for path in overrides:
        if is_used(path, used):
            continue
        configs.require_key(path)
        raise UserError(f"--config.{path}: lm {verb} does not use this key; {_shown(path, used)}")


def _shown(path: str, used: Patterns) -> str:
    """Describe the keys used instead: keys of the same section, and names of other sections."""
    keys = [known for known in SCHEMA if is_used(known, used)]
    if not keys:
        return "it has no configuration keys for its input"
    section = path.partition(".")[0]
    near = [known for known in keys if known.partition(".")[0] == section]
    others = dict.fromkeys(known.partition(".")[0] for known in keys if known not in near)
    return "it uses " + ", ".join([*near, *(f"{o}.*" if o != "seed" else o for o in others)])


# --- keys without effect

# Keys of the model that have an effect outside of the model's own configuration.
_OF_EVERY_FAMILY = ("family", "vocab_size", "max_length", "n_classes", "carry", "mixer")


def print_without_effect(
    config: ConfigDict, overrides: Mapping[str, Any], show: Callable[[str], Any] | None = None
) -> None:
    """Print a line for each override without effect, such as an option of an unselected component.

    Args:
        config: configuration including the overrides.
        overrides: overrides from the command line.
        show: prints a line; on stderr by default.
    """
    for line in without_effect(config, overrides):
        (show or partial(print, file=sys.stderr))(f"note: {line}")


def without_effect(config: ConfigDict, given: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each given key that has no effect.

    Args:
        config: valid configuration, including the given values.
        given: texts or values by dotted path, as on the command line.
    """
    for path, value in given.items():
        default = SCHEMA[path].default
        if str(value) != str(default) and (why := _why_unused(config, path)):
            yield f"--config.{path}={value} has no effect: {why}"


def _why_unused(config: ConfigDict, path: str) -> str:
    """Return what a key requires to have an effect, or ""."""
    needed, *values = SCHEMA[path].needs or ("",)
    if not needed:
        return _why_unused_by_model(config, path)
    now = config_value(config, needed)
    chosen = _chosen(config, needed) or [str(now)]
    if None in chosen or (set(values) & set(chosen) if values else now != SCHEMA[needed].default):
        return _why_unused(config, needed) or _why_unused_by_model(config, path)
    shown = " or ".join(values) if values else f"not {SCHEMA[needed].default!r}"
    return f"it needs --config.{needed} to be {shown}"


def _chosen(config: ConfigDict, key: str) -> list[str | None]:
    """Return the names selected from the registry of a key, if it has one.

    Contains None for plug-ins, which may use any key, and for values derived from other keys.
    """
    registries = [registry for registry in REGISTRIES if key in registry.keys_of_names]
    names = [n for r in registries for n in r.names_in(config)]
    plugins = {n for r in registries for n, entry in r.entries.items() if entry.plugin}
    given = [None if n in plugins else n for n in names if n]
    return given if given or not registries else [None]


def _why_unused_by_model(config: ConfigDict, path: str) -> str:
    """Return why a model family ignores a key, or ""; always "" if JAX is not loaded."""
    section, _, name = path.rpartition(".")
    is_own = any(path in entry.keys_added() for entry in MIXERS.entries.values())
    if section != "model" or name in _OF_EVERY_FAMILY or is_own or "jax" not in sys.modules:
        return ""
    from lm.models.transformer_config import config_class

    family = config.model.family
    names = [field.name for field in fields(config_class(MODELS[family]))]
    return "" if name in names else f"--config.model.family={family} does not use it"
