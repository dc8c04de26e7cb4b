"""Recovery of clock.json and metrics.jsonl from earlier starts of a run."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from lm.errors import UserError
from lm.storage import parse_json, read_json


def read_clock(
    file: Path, parts: Iterable[str]
) -> tuple[dict[str, float], int, int, int, dict[int, int]] | None:
    """Read clock.json with the seconds of `parts`; report a damaged file on stderr.

    Returns:
        Seconds by part, steps computed, starts, step at which the clock began, and log periods (see
        `Clock`); None if the file is damaged.
    """
    try:
        before = read_json(file)
        seconds = {part: float(before["seconds"][part]) for part in parts}
        counts = [int(before[name]) for name in ("steps_computed", "starts")]
        counts.append(int(before.get("first_step", 0)))
        periods = {int(step): int(n) for step, n in before.get("log_periods", {}).items()}
        least = min(*seconds.values(), *counts, *periods, *periods.values())
        if least >= 0 and math.isfinite(sum(seconds.values())):
            steps, starts, first_step = counts
            return seconds, steps, starts, first_step, dict(sorted(periods.items()))
    except (UserError, AttributeError, KeyError, TypeError, ValueError, OverflowError):
        pass
    print(f"{file} is damaged: the clock of the run restarts", file=sys.stderr, flush=True)
    return None


def keep_good_lines(file: Path, last_step: int, log_periods: Mapping[int, int]) -> list[bytes]:
    """Drop lines of metrics.jsonl that are damaged or belong to steps after the last one.

    Damage, and steps missing according to the log periods, are reported on stderr; a damaged file
    is kept as metrics.jsonl.damaged.

    Returns:
        Lines of the last step.
    """
    kept, damage = _good_lines(file, last_step, log_periods)
    if damage:
        copy = file.with_name(f"{file.name}.damaged")
        if file.is_file() and not copy.exists():
            copy.write_bytes(file.read_bytes())
        print(f"{file} is damaged ({damage}): the other lines are kept", file=sys.stderr)
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_bytes(b"".join(line for _, line in kept))
    temporary.replace(file)
    return [line for step, line in kept if step == last_step]


def _good_lines(
    file: Path, last_step: int, log_periods: Mapping[int, int]
) -> tuple[list[tuple[int, bytes]], str]:
    """Return the valid lines up to a step, with their steps, and a description of damage or ""."""
    if not file.is_file():
        return [], f"it is missing, with steps 1 to {last_step}" if last_step else ""
    *lines, _ = file.read_bytes().split(b"\n")
    kept, bad, trained, before = [], [], set(), 0
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line, file)
            step = row["step"]
        except (UserError, KeyError):
            step = None
        if type(step) is not int or step < before:
            bad.append(str(number))
        elif step <= last_step:
            kept.append((step, line + b"\n"))
            before = step
            trained |= {step} if "loss" in row else set()
    named = (("line", bad), ("no metrics of steps", _gaps(trained, last_step, log_periods)))
    parts = [f"{what} {', '.join(x[:5])}{' …' * (len(x) > 5)}" for what, x in named if x]
    return kept, "; ".join(parts)


def _gaps(found: set[int], last_step: int, log_periods: Mapping[int, int]) -> list[str]:
    """Return the ranges of steps that should have been logged but are missing."""
    starts = [(start, period) for start, period in log_periods.items() if start < last_step]
    stops = [start for start, _ in starts[1:]] + [last_step]
    logged = [
        step
        for (start, period), stop in zip(starts, stops, strict=False)
        if period
        for step in range(start - start % period + period, stop + 1, period)
    ]
    groups = itertools.groupby(logged, key=found.__contains__)
    missing = [list(steps) for is_there, steps in groups if not is_there]
    return [f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in missing]
