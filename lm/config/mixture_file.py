"""Mixture files: the corpora of a mixture by name, in TOML, read by an experiment file.

    [parts.web]
    source = "jsonl:web/*.jsonl.gz"
    validation = "jsonl:held_out/web.jsonl.gz"

    [parts.books]
    source = "parquet:books/*.parquet"

    [[schedule]]
    step = 0
    web = 0.9
    books = 0.1

Instead of a schedule, each part may have a `weight` or `epochs`; with neither, parts are weighted
by token count. A part that a schedule step does not name has weight 0 there.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lm.config.registry import listing
from lm.errors import UserError, nearest

_TEXT, _NUMBER = (str,), (int, float)
_PART_KEYS: dict[str, tuple[type, ...]] = {
    "source": _TEXT,
    "validation": _TEXT,
    "weight": _NUMBER,
    "epochs": _NUMBER,
}


def read_mixture(config: ConfigDict, file: str | Path) -> None:
    """Set the keys of section `data` from a mixture file: sources, weights, schedule.

    Without `validation` in any part, `data.validation_source` is unchanged.

    Args:
        config: configuration to change, in `get_config`.
        file: TOML file; relative to the current folder.

    Raises:
        UserError: the file is missing or invalid.
    """
    try:
        content = tomllib.loads(Path(file).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"mixture {file}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # invalid TOML or UTF-8
        raise UserError(f"mixture {file}: {error}") from error
    try:
        _fill(config.data, content)
    except (UserError, OverflowError) as error:  # OverflowError: a number of 400 digits
        raise UserError(f"mixture {file}: {error}") from error


def _fill(data: ConfigDict, content: Mapping[str, Any]) -> None:
    _require_known(content, ("parts", "schedule"), "key")
    parts, schedule = content.get("parts", {}), content.get("schedule", [])
    if not isinstance(parts, dict) or not parts:
        raise UserError("it has no parts: add [parts.NAME] with a source")
    if "step" in parts:
        raise UserError("a part cannot be named step: the schedule has a key of that name")
    for name, part in parts.items():
        if not isinstance(part, dict) or "source" not in part:
            raise UserError(f"part {name} has no source")
        _require_known(part, _PART_KEYS, f"key of part {name}:")
        for key, value in part.items():
            if not isinstance(value, _PART_KEYS[key]) or isinstance(value, bool) or value == "":
                raise UserError(f"part {name}: {key} = {value!r} is invalid")
    data.source = listing(part["source"] for part in parts.values())
    validation = [part["validation"] for part in parts.values() if "validation" in part]
    if validation:
        data.validation_source = listing(validation)
    data.weights, data.epochs = (
        tuple(_values_of(parts, key) if any(key in part for part in parts.values()) else ())
        for key in ("weight", "epochs")
    )
    data.schedule = "; ".join(_knot_texts(parts, schedule))


def _values_of(parts: Mapping[str, Mapping[str, Any]], key: str) -> Iterable[float]:
    for name, part in parts.items():
        if key not in part:
            raise UserError(f"part {name} has no {key}, but other parts do")
        yield float(part[key])


def _knot_texts(parts: Mapping[str, Any], schedule: Any) -> Iterable[str]:
    """Yield the schedule's knots in the text form of `data.schedule`."""
    if not isinstance(schedule, list) or not all(isinstance(knot, dict) for knot in schedule):
        raise UserError("the schedule must be a list: [[schedule]] with a step and weights")
    for knot in schedule:
        _require_known(knot, ("step", *parts), "part of the schedule:")
        if "step" not in knot:
            raise UserError(f"an entry of the schedule has no step: {knot}")
        yield f"{knot['step']}: {' '.join(str(knot.get(name, 0)) for name in parts)}"


def _require_known(found: Iterable[str], known: Iterable[str], what: str) -> None:
    for name in found:
        if name not in known:
            raise UserError(f"unknown {what} {name}{nearest(name, tuple(known))}")
