"""Runs that a scaling law is fitted to: sizes, tokens and losses.

N counts all parameters, embeddings included, and training costs C = 6·N·D FLOPs, as in
Hoffmann et al. 2022 (arXiv 2203.15556).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lm.errors import UserError
from lm.tools.reports.run_records import TRAIN_LOSS, VALIDATION_LOSS, find_runs

COLUMNS = "Model Size", "Training FLOP", "loss"


@dataclass(frozen=True)
class Runs:
    """Arrays over runs, [runs].

    Attributes:
        n: Parameters.
        d: Training tokens.
        loss: Final loss, nats a token.
    """

    n: np.ndarray
    d: np.ndarray
    loss: np.ndarray

    def __len__(self) -> int:
        return len(self.n)

    def __getitem__(self, chosen: np.ndarray) -> Runs:
        """Select runs by a mask or by indices."""
        return Runs(self.n[chosen], self.d[chosen], self.loss[chosen])

    @property
    def flop(self) -> np.ndarray:
        """Training FLOPs, 6·N·D."""
        return 6 * self.n * self.d


def runs_of_table(file: Path) -> Runs:
    """Read a CSV table with the columns `Model Size`, `Training FLOP` and `loss`.

    Raises:
        UserError: A column is missing, or a cell is not a positive number.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --runs {file}: {error}") from None
    for column in COLUMNS:
        if rows and column not in rows[0]:
            raise UserError(f"--runs {file} has no column {column!r}; it has {list(rows[0])}")
    table = np.array([_row(file, line, row) for line, row in enumerate(rows, 2)])
    n, flop, loss = table.reshape(-1, 3).T
    return Runs(n, flop / (6 * n), loss)


def _row(file: Path, line: int, row: Mapping[str, str]) -> list[float]:
    try:
        values = [float(row[column]) for column in COLUMNS]
    except (TypeError, ValueError):
        values = [math.nan]
    if not all(0 < value < math.inf for value in values):
        shown = ", ".join(f"{column}={row[column]!r}" for column in COLUMNS)
        raise UserError(f"--runs {file}, line {line}: not three positive numbers: {shown}")
    return values


def runs_of_folder(workdir: Path) -> tuple[Runs, list[str]]:
    """Read the finished runs of a sweep.

    The loss is that of the last evaluation or, if no run was evaluated, of the end of training.

    Returns:
        The runs, and one line on each run that is left out.
    """
    found = find_runs(workdir)
    evaluated = any(VALIDATION_LOSS in run.curves for run in found)
    metric = VALIDATION_LOSS if evaluated else TRAIN_LOSS
    points, left_out = [], []
    for run in found:
        loss = run.final(metric)
        if not run.finished:
            at = f"at step {run.last_step} of {run.config['train.steps']}"
            left_out.append(f"{run.name}: not finished, {at}")
        elif loss is None or run.size is None:
            left_out.append(f"{run.name}: {run.problem or f'no finite {metric}'}")
        else:
            tokens = run.last_step * run.size.tokens_per_step
            points.append((run.size.parameters, tokens, loss))
    return Runs(*np.array(points, float).reshape(-1, 3).T), left_out
