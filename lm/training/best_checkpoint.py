"""Checkpoint with the best validation figure, kept in a run's folder "best"."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lm.errors import UserError
from lm.runs.checkpoints import BEST_FOLDER, Checkpoints
from lm.runs.workdir import saved_metadata
from lm.storage import storage_path
from lm.train_step import TrainState


class BestCheckpoint:
    """Best state so far by a validation figure; restarts continue the comparison."""

    def __init__(self, workdir: Path, figure: str, options: ConfigDict, metadata: dict[str, Any]):
        """Open the folder "best" of a run.

        Args:
            workdir: folder of the run.
            figure: name of the figure, such as "accuracy"; "-loss" where lower is better.
            options: section "checkpoint" of the configuration.
            metadata: metadata of the run, written into the checkpoint.
        """
        self._figure = figure
        self._name = figure.removeprefix("-")
        self._sign = -1.0 if figure.startswith("-") else 1.0
        options = ConfigDict({**options, "keep_last": 1, "keep_every_steps": 0})
        self._checkpoints = Checkpoints(workdir / BEST_FOLDER / "checkpoints", options, metadata)
        self._value = -float("inf")
        if (step := self._checkpoints.latest_step) is not None:
            folder = storage_path(workdir / BEST_FOLDER / "checkpoints") / str(step)
            kept = saved_metadata(folder)
            if kept is None:
                raise UserError(f"{folder} is damaged (its metadata): move it away")
            before = kept.get("figure", figure)
            if before != figure or self._name not in kept:
                raise UserError(
                    f"--config.eval.best={figure}: {workdir / BEST_FOLDER} is the best by "
                    f"{before if before != figure else 'another figure'}: move that folder away"
                )
            self._value = self._sign * kept[self._name]

    def offer(self, step: int, state: TrainState, figures: Mapping[str, float]) -> None:
        """Keep the state if its figure is better than the kept one.

        Raises:
            UserError: the evaluation has no figure of that name.
        """
        if self._name not in figures:
            known = ", ".join(figures)
            raise UserError(f"--config.eval.best={self._name} is none of the figures: {known}")
        value = self._sign * figures[self._name]
        # Orbax saves nothing at a step up to its newest; a restart repeats such steps.
        is_new = step > (self._checkpoints.latest_step or 0)
        if is_new and value > self._value:
            self._value = value
            notes = {self._name: figures[self._name], "figure": self._figure}
            self._checkpoints.save(step, state, notes)
            # Else a kill after the run's own checkpoint of this step could lose the best one.
            self._checkpoints.wait()

    def close(self) -> None:
        """Wait until the kept checkpoint is on the disk."""
        self._checkpoints.close()
