"""Ramps of batch size and sequence length during training: parsing and validation.

`data.batch_ramp` (GPT-3, Brown et al. 2020, §2.3: small batches first) and `data.length_ramp`
(sequence-length warm-up, Li et al. 2022, arXiv 2108.06084: short sequences first) are step
functions "STEP: SIZE; STEP: SIZE; …", from step 0 up to `data.batch_size` and
`data.sequence_length`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

from lm.config.registries import OBJECTIVES
from lm.errors import UserError

KEYS = {"batch_ramp": "batch_size", "length_ramp": "sequence_length"}  # in section "data"


class Stage(NamedTuple):
    """Stage of a ramp, with constant batch size and sequence length.

    Attributes:
        step: first step of the stage.
        first_row: number of rows in all earlier batches.
        rows: batch size.
        length: tokens per row.
    """

    step: int
    first_row: int
    rows: int
    length: int


def stages(data: ConfigDict) -> list[Stage]:
    """Return the stages of section "data" in order; at least one.

    Raises:
        UserError: a ramp key is invalid.
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
    """Return the number of rows in all batches before a step."""
    last = next(stage for stage in reversed(stages(data)) if stage.step <= step)
    return last.first_row + (step - last.step) * last.rows


def full_rows(data: ConfigDict, steps: int) -> float:
    """Return the tokens before a step, in units of full-length rows."""
    found = stages(data)
    ends = [*(stage.step for stage in found[1:]), steps]
    sizes = (
        (min(end, steps) - min(stage.step, steps)) * stage.rows * stage.length
        for stage, end in zip(found, ends, strict=True)
    )
    return sum(sizes) / data.sequence_length


def _parse(data: ConfigDict, name: str) -> list[tuple[int, int]]:
    """Return the (step, size) pairs of a ramp; a single pair without a ramp."""
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
            raise UserError(
                f"{where}: {n} is not between 1 and --config.data.{KEYS[name]}={largest}"
            )
        if at <= found[-1][0] if found else at:
            raise UserError(f"{where}: steps must ascend from 0, but {at} does not")
        found.append((at, n))
    if not found or found[-1][1] != largest:
        raise UserError(f"{where}: the last size must be --config.data.{KEYS[name]}={largest}")
    return found


def ramp_problems(config: ConfigDict) -> Iterator[str]:
    """Yield an error message for each conflict between a ramp and other keys.

    Raises:
        UserError: the ramp is invalid.
    """
    data, train = config.data, config.train
    given = [name for name in KEYS if data[name]]
    if not given:
        return
    named = f"--config.data.{given[0]}"
    for stage in stages(data):
        if stage.step % train.steps_per_dispatch:
            yield (
                f"{named}: step {stage.step} is not a multiple of "
                f"--config.train.steps_per_dispatch={train.steps_per_dispatch}"
            )
        if stage.rows % train.microbatches:
            yield (
                f"{named}: {stage.rows} rows are not divisible by "
                f"--config.train.microbatches={train.microbatches}"
            )
    if data.order == "contiguous":
        yield (
            f"{named} is not supported with --config.data.order=contiguous: rows continue in the "
            "next batch"
        )
    objective = config.objective.name
    if data.length_ramp and not OBJECTIVES.entries[objective].predicts_every_token:
        yield f"--config.data.length_ramp is not supported with --config.objective.name={objective}"
