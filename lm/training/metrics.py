"""Metrics of a run: metrics.jsonl, TensorBoard events and a progress bar."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from tensorboardX import SummaryWriter
from tqdm import tqdm

from lm.storage import push


class MetricsFile:
    """One JSON object a line, each with its step; continues a file after a restart.

    Lines after `first_step` (written by a process that died before its next checkpoint) and a
    half-written last line are dropped, so that every step is there exactly once.
    """

    def __init__(self, file: Path, first_step: int):
        kept = [line for line in _complete_lines(file) if json.loads(line)["step"] <= first_step]
        temporary = file.with_name(f".{file.name}.tmp")
        temporary.write_text("".join(kept))
        temporary.replace(file)
        self._stream = file.open("a")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._stream.write(json.dumps({"step": step, **finite}) + "\n")

    def flush(self) -> None:
        """What was written survives this process being killed."""
        self._stream.flush()

    def sync(self) -> None:
        """What was written survives the machine losing power."""
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()


def _complete_lines(file: Path) -> list[str]:
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [line for line in lines if line.endswith("\n")]


class MetricsWriter:
    """Sends the metrics of a step everywhere they go."""

    def __init__(self, workdir: Path, first_step: int, last_step: int, tensorboard: bool):
        self._file = MetricsFile(workdir / "metrics.jsonl", first_step)
        self._events = None
        if tensorboard:
            self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1)
        self._bar = tqdm(
            total=last_step,
            initial=first_step,
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 15,
        )

    def step(self, step: int, values: Mapping[str, float], written: bool) -> None:
        """The metrics of a training step; only a `written` step goes to the files."""
        if written:
            self.write(step, values)
        self._bar.update(step - self._bar.n)
        self._bar.set_postfix(
            loss=f"{values['loss']:.4f}",
            tok_s=f"{values['tokens_per_second']:,.0f}",
            refresh=False,
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics of a step, of training or of an evaluation."""
        self._file.write(step, values)
        if self._events is not None:
            for name, value in values.items():
                tag = name if "/" in name else f"train/{name}"
                self._events.add_scalar(tag, value, step)

    def say(self, message: str) -> None:
        """A line on stderr that does not break the progress bar."""
        self._bar.write(message, file=sys.stderr)

    def flush(self) -> None:
        self._file.flush()

    def sync(self) -> None:
        self._file.sync()
        if self._events is not None:
            self._events.flush()
        push()

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        if self._events is not None:
            self._events.close()


class SilentWriter(MetricsWriter):
    """The writer of the processes that do not write."""

    def __init__(self) -> None:
        pass

    def step(self, step: int, values: Mapping[str, float], written: bool) -> None:
        pass

    def write(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def say(self, message: str) -> None:
        pass

    def flush(self) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass
