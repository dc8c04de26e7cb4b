"""Batch sizes and lengths of rows that change while a run trains: the text of their keys.

`data.batch_ramp` (GPT-3, Brown et al. 2020, §2.3: small batches first) and `data.length_ramp`
(sequence-length warm-up, Li et al. 2022, arXiv 2108.06084: short rows first) are staircases
"STEP: SIZE; STEP: SIZE; …", from step 0 to the sizes of `data.batch_size` and
`data.sequence_length`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

from lm.config.registries import OBJECTIVES
from lm.errors import UserError

KEYS = {"batch_ramp": "batch_size", "length_ramp": "sequence_length"}  # of section "data"


class Stage(NamedTuple):
    """Batches from a step on.

    Attributes:
        step: its first step.
        first_row: rows of all batches before it.
        rows: rows of a batch.
        length: tokens of a row.
    """

    step: int
    first_row: int
    rows: int
    length: int


def stages(data: ConfigDict) -> list[Stage]:
    """Return the stages of the section "data", one at least, in order.

    Raises:
        UserError: a key is wrong.
    """
    ramps = [_parse(data, name) for name in KEYS]
    found: list[Stage] = []
    for step in sorted({at for ramp in ramps for at, _ in ramp}):
        rows, length = (next(size for at, size in reversed(ramp) if at <= step) for ramp in ramps)
        last = found[-1] if found else Stage(0, 0, 0, 0)
        first_row = last.first_row + (step - last.step) * last.rows
        found.append(Stage(step, first_row, rows, length))
    return found


def rows_before(data: ConfigDict, step: int) -> int:
    """Return how many rows the batches before a step have."""
    last = next(stage for stage in reversed(stages(data)) if stage.step <= step)
    return last.first_row + (step - last.step) * last.rows


def full_rows(data: ConfigDict, steps: int) -> float:
    """Return how many rows of the full length hold the tokens of the batches before a step."""
    found = stages(data)
    ends = [*(stage.step for stage in found[1:]), steps]
    sizes = (
        (min(end, steps) - min(stage.step, steps)) * stage.rows * stage.length
        for stage, end in zip(found, ends, strict=True)
    )
    return sum(sizes) / data.sequence_length


def _parse(data: ConfigDict, name: str) -> list[tuple[int, int]]:
    """Return the steps and sizes of a ramp; a single one where there is none."""
    largest, text = data[KEYS[name]], data[name]
    where = f"--config.data.{name}={text!r}"
    found: list[tuple[int, int]] = []
    for part in filter(str.strip, (text or f"0: {largest}").split(";")):
        step, _, size = part.partition(":")
        try:
            at, n = int(step), int(size)
        except ValueError:
            raise UserError(f"{where}: expected STEP: SIZE, not {part.strip()!r}") from None
        if not 1 <= n <= largest:
            raise UserError(f"{where}: {n} is not 1 to --config.data.{KEYS[name]}={largest}")
        if at <= found[-1][0] if found else at:
            raise UserError(f"{where}: steps ascend from 0, and {at} does not")
        found.append((at, n))
    if not found or found[-1][1] != largest:
        raise UserError(f"{where}: the last size must be --config.data.{KEYS[name]}={largest}")
    return found


def ramp_problems(config: ConfigDict) -> Iterator[str]:
    """Yield what is wrong between a ramp and other keys.

    Raises:
        UserError: the text of a ramp is wrong.
    """
    data, train = config.data, config.train
    given = [name for name in KEYS if data[name]]
    if not given:
        return
    named = f"--config.data.{given[0]}"
    for stage in stages(data):
        if stage.step % train.steps_per_dispatch:
            yield (
                f"{named}: step {stage.step} is no multiple of "
                f"--config.train.steps_per_dispatch={train.steps_per_dispatch}"
            )
        if stage.rows % train.microbatches:
            yield (
                f"{named}: {stage.rows} rows are not divisible by "
                f"--config.train.microbatches={train.microbatches}"
            )
    if data.order == "contiguous":
        yield f"{named} is not for --config.data.order=contiguous: rows go on in the next batch"
    objective = config.objective.name
    if data.length_ramp and not OBJECTIVES.entries[objective].predicts_every_token:
        yield f"--config.data.length_ramp is not for --config.objective.name={objective}"
