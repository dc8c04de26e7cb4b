"""Fuzz configurations: each must be valid, or be rejected with a one-line error.

    python scripts/check_configs.py [--n 1000] [--seed 0] [--devices 8]

A configuration starts as the defaults or as one of the objectives. Some of its values are then
replaced by other types, None, empty, negative, huge or infinite numbers, NaN, tuples, or unknown
names; keys and sections are added, removed, or get a wrong type. The script prints tracebacks,
multi-line messages, and accepted values that the schema does not allow; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from lm.config import default, flatten, set_value
from lm.config.registries import MODELS, OBJECTIVES, SCHEMA
from lm.config.rules import families_of
from lm.errors import UserError
from lm.experiment import check

ODD = (
    *(None, "", " ", "x", "x:y", "0", ",", "\0", "é\ud800", "a" * 5000),
    *(0, 1, -1, 2, 3, 7, 2**28, 2**31, 2**63, 10**30, -(2**63), True, False),
    *(0.0, -0.0, 0.5, 1e-45, 1e-300, 1e38, 1e300, math.inf, -math.inf, math.nan, -1.5),
    *((), (0.5,), (math.nan,), ("x",), (None,), (1, 2, 3), [1.0], [[1]], {}, {"a": 1}),
    *(b"x", 1j, object, {1, 2}, range(3)),
)


def damaged_config(rng: random.Random) -> tuple[ConfigDict, str]:
    """Return a damaged configuration and what was done to it."""
    values = default().to_dict()
    objective = rng.choice(list(OBJECTIVES))
    values["objective"]["name"] = objective
    values["model"]["family"] = rng.choice([f for f in families_of(objective) if f in MODELS])
    if OBJECTIVES.entries[objective].columns:
        values["data"]["source"] = "jsonl:none.jsonl"
    done = [f"{objective} {values['model']['family']}"]
    for _ in range(rng.randint(1, 3)):
        path = rng.choice(list(SCHEMA))
        done.append(rng.choice(_DAMAGES)(values, path, rng))
    return ConfigDict(values), "; ".join(done)


# As on the command line, after the file of the user.
OVERRIDES = {"train.steps": 3, "parallel.mesh.data": -1, "optimizer.adamw.b1": 0.5}


def _parent(values: dict, path: str) -> tuple[dict, str]:
    *sections, name = path.split(".")
    for section in sections:
        node = values.get(section)
        if not isinstance(node, dict):  # damaged already
            return values, name
        values = node
    return values, name


def _odd_value(values: dict, path: str, rng: random.Random) -> str:
    node, name = _parent(values, path)
    node[name] = rng.choice(ODD)
    return f"{path}={node[name]!r:.60}"


def _near_value(values: dict, path: str, rng: random.Random) -> str:
    """Set a value of the right type, at or near the limits of its range."""
    node, name = _parent(values, path)
    key = SCHEMA[path]
    limits = [limit for limit in (key.low, key.high) if limit is not None] or [0]
    found: Any = {
        bool: rng.choice((True, False)),
        str: rng.choice((*key.choices, "byte", "stdlib", "text:none.txt", "a,b", "=>", "(")),
        int: int(rng.choice(limits)) + rng.choice((-1, 0, 1, 5)),
        float: float(rng.choice(limits)) * rng.choice((0.999, 1, 1.001)) + rng.choice((0, 1e-9)),
        tuple: rng.choice(((), (1.0,), (0.5, 0.5), (-1.0,))),
    }[key.type]
    node[name] = found
    return f"{path}={found!r}"


def _missing(values: dict, path: str, rng: random.Random) -> str:
    node, name = _parent(values, path)
    node.pop(name, None)
    return f"no {path}"


def _damaged_section(values: dict, path: str, rng: random.Random) -> str:
    section = path.partition(".")[0]
    values[section] = rng.choice(ODD)
    return f"{section}={values[section]!r:.60}"


def _unknown_key(values: dict, path: str, rng: random.Random) -> str:
    node, name = _parent(values, path)
    other = rng.choice((name[:-1] or "x", name + "s", name.upper(), "lr", "_fields", ""))
    node.setdefault(other, rng.choice(ODD))
    return f"{other!r} beside {path}"


_DAMAGES: tuple[Callable[[dict, str, random.Random], str], ...] = (
    *(_odd_value, _odd_value, _near_value, _near_value),
    *(_missing, _damaged_section, _unknown_key),
)


def problem_of(config: ConfigDict, n_devices: int) -> str:
    """Return what is wrong with the checks' response to a configuration, or ""."""
    try:
        for path, value in OVERRIDES.items():
            set_value(config, path, value)
        check(config, "cpu", n_devices)
    except UserError as error:
        message = str(error)
        return "" if message and "\n" not in message else f"not one line: {message!r}"
    except Exception:
        return traceback.format_exc()
    return next(_not_allowed(config), "")


def _not_allowed(config: ConfigDict) -> Iterator[str]:
    """Yield values that the schema does not allow, without using the library's own check."""
    for path, value in flatten(config):
        key = SCHEMA[path]
        types = {float: (int, float), tuple: (tuple, list)}.get(key.type, (key.type,))
        if not isinstance(value, types) or (isinstance(value, bool) and key.type is not bool):
            yield f"accepted: {path}={value!r} is no {key.type.__name__}"
        elif key.type in (int, float) and not math.isfinite(value):
            yield f"accepted: {path}={value!r}"
        elif key.type in (int, float) and not (
            (-math.inf if key.low is None else key.low)
            <= value
            <= (math.inf if key.high is None else key.high)
        ):
            yield f"accepted: {path}={value!r} is out of range"
        elif key.choices and value not in key.choices:
            yield f"accepted: {path}={value!r} is no choice"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--devices", type=int, default=8)
    args = parser.parse_args()
    rng, counts = random.Random(args.seed), Counter[str]()
    for number in range(args.n):
        config, done = damaged_config(rng)
        problem = problem_of(config, args.devices)
        counts["faults" if problem else "treated well"] += 1
        if problem:
            print(f"{number}: {done}\n{problem}\n", file=sys.stderr)
    print(dict(counts))
    return 1 if counts["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
