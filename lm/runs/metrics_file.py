"""Metrics measured after training, added to the metrics.jsonl of a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from lm.errors import UserError
from lm.storage import open_run_folder, parse_json, resolve_path, run_lock, write_atomically


def record_figures(place: str, step: int, figures: Mapping[str, float]) -> None:
    """Record metrics of a checkpoint in the metrics.jsonl of a run.

    If the run is training, the file is not changed and a line on stderr says so.

    Args:
        place: workdir, local or in a bucket.
        step: step of the checkpoint.
        figures: finite values by name.
    """
    try:
        with run_lock(resolve_path(place)):
            add_figures(open_run_folder(place) / "metrics.jsonl", step, figures)
    except UserError as error:
        print(f"note: metrics.jsonl was not changed: {error}", file=sys.stderr)


def add_figures(file: Path, step: int, figures: Mapping[str, float]) -> None:
    """Insert metrics of a checkpoint after the other lines of its step or of earlier steps.

    Replaces values of the same name and step. The caller holds the lock of the run.

    Args:
        file: metrics.jsonl; created if missing.
        step: step of the checkpoint.
        figures: finite values by name.
    """
    kept, at = [], 0
    for line in file.read_text().splitlines(keepends=True) if file.exists() else ():
        try:
            row = parse_json(line, file)
        except UserError:
            row = {}
        same = row.get("step") == step
        if same and row.keys() & figures.keys():
            row = {name: value for name, value in row.items() if name not in figures}
            line = json.dumps(row) + "\n"
        if not same or len(row) > 1:
            kept.append(line)
        if isinstance(row.get("step"), int) and row["step"] <= step:
            at = len(kept)
    kept.insert(at, json.dumps({"step": step, **figures}) + "\n")
    write_atomically(file, "".join(kept))
