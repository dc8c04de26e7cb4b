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

Instead of a schedule each part may have a `weight`, or `epochs`; with none of them the parts are
mixed by their tokens. A part that a step of the schedule does not name has no weight there.
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
_OF_PART: dict[str, tuple[type, ...]] = {
    "source": _TEXT,
    "validation": _TEXT,
    "weight": _NUMBER,
    "epochs": _NUMBER,
}


def read_mixture(config: ConfigDict, file: str | Path) -> None:
    """Set the keys of section `data` that a mixture file says: sources, weights, schedule.

    Without `validation` in any part, `data.validation_source` stays as it is.

    Args:
        config: configuration to change, in `get_config`.
        file: TOML file; relative to the current folder.

    Raises:
        UserError: the file is missing, or something in it is wrong.
    """
    try:
        content = tomllib.loads(Path(file).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"mixture {file}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # of TOML, or of UTF-8
        raise UserError(f"mixture {file}: {error}") from error
    try:
        _fill(config.data, content)
    except (UserError, OverflowError) as error:  # of a number of 400 digits
        raise UserError(f"mixture {file}: {error}") from error


def _fill(data: ConfigDict, content: Mapping[str, Any]) -> None:
    _require_known(content, ("parts", "schedule"), "key")
    parts, schedule = content.get("parts", {}), content.get("schedule", [])
    if not isinstance(parts, dict) or not parts:
        raise UserError("no parts: [parts.NAME] with a source")
    if "step" in parts:
        raise UserError("part step: call it otherwise, the schedule has a key of that name")
    for name, part in parts.items():
        if not isinstance(part, dict) or "source" not in part:
            raise UserError(f"part {name} has no source")
        _require_known(part, _OF_PART, f"key of part {name}:")
        for key, value in part.items():
            if not isinstance(value, _OF_PART[key]) or isinstance(value, bool) or value == "":
                raise UserError(f"part {name}: {key} = {value!r}")
    data.source = listing(part["source"] for part in parts.values())
    validation = [part["validation"] for part in parts.values() if "validation" in part]
    if validation:
        data.validation_source = listing(validation)
    data.weights, data.epochs = (
        tuple(_of_all(parts, key) if any(key in part for part in parts.values()) else ())
        for key in ("weight", "epochs")
    )
    data.schedule = "; ".join(_knots(parts, schedule))


def _of_all(parts: Mapping[str, Mapping[str, Any]], key: str) -> Iterable[float]:
    for name, part in parts.items():
        if key not in part:
            raise UserError(f"part {name} has no {key}, and others have")
        yield float(part[key])


def _knots(parts: Mapping[str, Any], schedule: Any) -> Iterable[str]:
    """Yield the knots as `data.schedule` has them."""
    if not isinstance(schedule, list) or not all(isinstance(knot, dict) for knot in schedule):
        raise UserError("the schedule is a list: [[schedule]] with a step and weights")
    for knot in schedule:
        _require_known(knot, ("step", *parts), "part of the schedule:")
        if "step" not in knot:
            raise UserError(f"a knot of the schedule has no step: {knot}")
        yield f"{knot['step']}: {' '.join(str(knot.get(name, 0)) for name in parts)}"


def _require_known(found: Iterable[str], known: Iterable[str], what: str) -> None:
    for name in found:
        if name not in known:
            raise UserError(f"unknown {what} {name}{nearest(name, tuple(known))}")
