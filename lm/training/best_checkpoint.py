"""Keeping the checkpoint that is best by a validation figure, in a run's folder "best"."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lm.errors import UserError
from lm.runs.checkpoints import Checkpoints
from lm.train_step import TrainState

FOLDER = "best"


class BestCheckpoint:
    """The best state so far by `figure`: such as "accuracy", or "-loss" where less is better.

    Without a figure nothing is kept. After a restart the search goes on from what is kept.
    """

    def __init__(self, workdir: Path, figure: str, options: ConfigDict, metadata: dict[str, Any]):
        self._name = figure.removeprefix("-")
        self._sign = -1.0 if figure.startswith("-") else 1.0
        self._value = -float("inf")
        self._checkpoints: Checkpoints | None = None
        if figure:
            options = ConfigDict({**options, "keep_last": 1, "keep_every_steps": 0})
            self._checkpoints = Checkpoints(workdir / FOLDER / "checkpoints", options, metadata)
            kept = self._checkpoints.latest_metadata()
            self._value = self._sign * kept[self._name] if kept else self._value

    def offer(self, step: int, state: TrainState, figures: Mapping[str, float]) -> None:
        """Keep the state if its figure beats that of the one that is kept."""
        if self._checkpoints is None:
            return
        if self._name not in figures:
            known = ", ".join(figures)
            raise UserError(f"--config.eval.best={self._name} is none of the figures: {known}")
        value = self._sign * figures[self._name]
        # Orbax saves nothing at a step up to its newest; a restart repeats such steps.
        is_new = step > (self._checkpoints.latest_step or 0)
        if is_new and value > self._value:
            self._value = value
            self._checkpoints.save(step, state, {self._name: figures[self._name]})
            # Else a kill after the run's own checkpoint of this step could lose the best one.
            self._checkpoints.wait()

    def close(self) -> None:
        """Wait until what was kept is on the disk."""
        if self._checkpoints is not None:
            self._checkpoints.close()
