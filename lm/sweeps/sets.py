"""Sets of overrides, `{key: value}`, one per run of a sweep.

Lists of sets are joined with `+` and multiplied with `product`; `named` names them.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm.errors import UserError

Overrides = dict[str, Any]
Distribution = Callable[[random.Random], Any]


def grid(values: Mapping[str, Sequence[Any]]) -> list[Overrides]:
    """Return every combination of the values of the keys."""
    return [
        dict(zip(values, combination, strict=True))
        for combination in itertools.product(*values.values())
    ]


def zipped(values: Mapping[str, Sequence[Any]]) -> list[Overrides]:
    """Return one set of the first values of all keys, one of the second values, and so on.

    Raises:
        UserError: The keys have different numbers of values.
    """
    lengths = {key: len(of_key) for key, of_key in values.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(f"zipped: keys have different numbers of values: {lengths}")
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


def product(*lists: Sequence[Overrides]) -> list[Overrides]:
    """Return every union of one set from each list; later lists win for equal keys."""
    return [
        {key: value for part in parts for key, value in part.items()}
        for parts in itertools.product(*lists)
    ]


def sampled(distributions: Mapping[str, Distribution], n: int, seed: int) -> list[Overrides]:
    """Return `n` random sets.

    Each key has its own generator, so that adding a key does not change the other values.
    """
    generators = {key: random.Random(f"{seed}/{key}") for key in distributions}
    return [{key: draw(generators[key]) for key, draw in distributions.items()} for _ in range(n)]


def uniform(low: float, high: float) -> Distribution:
    """Draw uniformly from `low` to `high`, rounded to four digits."""
    return lambda generator: _rounded(generator.uniform(low, high))


def log_uniform(low: float, high: float) -> Distribution:
    """Draw log-uniformly from `low` to `high`, rounded to four digits."""
    if not 0 < low <= high:
        raise UserError(f"log_uniform({low}, {high}): needs 0 < low ≤ high")
    return lambda generator: _rounded(math.exp(generator.uniform(math.log(low), math.log(high))))


def choice(*values: Any) -> Distribution:
    """Draw one of the values."""
    return lambda generator: generator.choice(values)


def named(sets: Sequence[Overrides]) -> dict[str, Overrides]:
    """Return sets by name: the keys in which they differ, `d_model=64,learning_rate=0.01`.

    Raises:
        UserError: Two different sets would have the same name.
    """
    keys = sorted({key for overrides in sets for key in overrides})
    varied = [key for key in keys if len({str(o.get(key)) for o in sets}) > 1] or keys
    tails = [key.rpartition(".")[2] for key in varied]
    short = {
        key: tail if tails.count(tail) == 1 else key
        for key, tail in zip(varied, tails, strict=True)
    }
    runs: dict[str, Overrides] = {}
    for overrides in sets:
        parts = [
            f"{short[key]}={_folder_name(overrides[key])}" for key in varied if key in overrides
        ]
        name = ",".join(parts) or "run"
        if runs.get(name, overrides) != overrides:
            raise UserError(
                f"two runs of the sweep would have the same name, {name}: name them yourself"
            )
        runs[name] = overrides
    return runs


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _folder_name(value: Any) -> str:
    """Format a value as part of a folder's name."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return "".join(c if c.isalnum() or c in "._-+" else "_" for c in text)
