"""Mixtures of corpora: parsing of `data.schedule` and validation of the mixture keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

from lm.config.registry import listed
from lm.errors import UserError

_LARGEST = 1e30  # largest weight or step: sums and products with sizes stay finite


class Knot(NamedTuple):
    """Weights of all parts at a training step, or at a row index."""

    at: int
    weights: tuple[float, ...]


def parse_schedule(text: str, n_parts: int) -> tuple[Knot, ...]:
    """Parse `data.schedule`: "STEP: WEIGHT WEIGHT …; STEP: …", linear in between.

    Two knots at the same step make a step change.

    Args:
        text: the schedule; steps ascend.
        n_parts: number of sources.

    Returns:
        The knots, with `at` in steps.

    Raises:
        UserError: the schedule is wrong.
    """
    where = f"--config.data.schedule={text!r}"
    knots: list[Knot] = []
    for part in filter(str.strip, text.split(";")):
        step, colon, weights = part.partition(":")
        try:
            knot = Knot(int(step), tuple(float(weight) for weight in weights.split()))
        except ValueError:
            colon = ""
        if not colon:
            raise UserError(f"{where}: expected STEP: WEIGHT WEIGHT …, not {part.strip()!r}")
        if len(knot.weights) != n_parts:
            raise UserError(f"{where}: {len(knot.weights)} weights for {n_parts} sources")
        if not all(0 <= weight <= _LARGEST for weight in knot.weights) or not any(knot.weights):
            raise UserError(
                f"{where}: weights must be 0 to {_LARGEST:g}, and not all 0: {part.strip()!r}"
            )
        if not (knots[-1].at if knots else 0) <= knot.at <= _LARGEST:
            raise UserError(
                f"{where}: steps must ascend from 0 to at most {_LARGEST:g}, and {knot.at} does not"
            )
        knots.append(knot)
    if not knots:
        raise UserError(f"{where}: no weights")
    return tuple(knots)


def mixture_problems(data: ConfigDict) -> Iterator[str]:
    """Yield an error message for each violated rule between mixture keys.

    Raises:
        UserError: `data.schedule` is wrong.
    """
    if data.schedule:
        parse_schedule(data.schedule, len(listed(data.source)))
    given = [name for name in ("weights", "schedule", "epochs") if data[name]]
    if len(given) > 1:
        yield f"--config.data.{given[0]} and --config.data.{given[1]}: set only one of them"
    for name in ("weights", "epochs"):
        if data[name] and len(data[name]) != len(listed(data.source)):
            yield (
                f"--config.data.{name} has {len(data[name])} numbers for "
                f"{len(listed(data.source))} corpora in --config.data.source"
            )
        if any(not 0 < number <= _LARGEST for number in data[name]):
            yield (
                f"--config.data.{name}={data[name]}: every {name[:-1]} must be above 0, "
                f"and at most {_LARGEST:g}"
            )
