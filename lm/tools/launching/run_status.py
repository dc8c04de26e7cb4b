"""What the files of a run say: how far it is, how good, what went wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lm.tools.launching.processes import ERROR

TAIL = 65536


def last_values(workdir: Path) -> dict[str, Any]:
    """The newest value of every metric of a run, and `step`; empty if there is none yet."""
    values: dict[str, Any] = {}
    for line in _tail(workdir / "metrics.jsonl"):
        try:
            values.update(json.loads(line))
        except json.JSONDecodeError:  # the cut first line, or one that is being written
            continue
    return values


def value_at(workdir: Path, metric: str, step: int) -> float | None:
    """A metric at a step: its last value up to there, of "loss" the mean of the last tenth."""
    found: list[float] = []
    for row in _rows(workdir / "metrics.jsonl"):
        recent = metric != "loss" or row["step"] > 0.9 * step
        if row["step"] <= step and recent and row.get(metric) is not None:
            found.append(row[metric])
    if not found:
        return None
    return sum(found) / len(found) if metric == "loss" else found[-1]


def last_words(log: Path) -> str:
    """The last line of a log that reports an error, else its last line."""
    lines = [line.strip() for text in _tail(log) for line in text.split("\r") if line.strip()]
    errors = [line for line in lines if ERROR.match(line)]
    return (errors or lines or ["no output"])[-1]


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text().splitlines(keepends=True) if file.exists() else []:
        if line.endswith("\n"):
            yield json.loads(line)


def _tail(file: Path) -> list[str]:
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - TAIL))
            return stream.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
