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

from lm.storage import upload_changes


class MetricsFile:
    """metrics.jsonl: one JSON object a line, each with its step.

    Opening it drops the lines after `first_step`, which a process wrote that died before its next
    checkpoint, and a half-written last line: every step is there exactly once.
    """

    def __init__(self, file: Path, first_step: int):
        """Open `file` to continue after `first_step`."""
        kept = [line for line in _complete_lines(file) if json.loads(line)["step"] <= first_step]
        temporary = file.with_name(f".{file.name}.tmp")
        temporary.write_text("".join(kept))
        temporary.replace(file)
        self._stream = file.open("a")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line; values that are not finite become null."""
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._stream.write(json.dumps({"step": step, **finite}) + "\n")

    def flush(self) -> None:
        """Hand the lines to the operating system: they survive the death of this process."""
        self._stream.flush()

    def sync(self) -> None:
        """Write the lines to the disk: they survive a power failure."""
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def _complete_lines(file: Path) -> list[str]:
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [line for line in lines if line.endswith("\n")]


class MetricsWriter:
    """Writer of metrics to the file, TensorBoard and the progress bar of the lead process."""

    def __init__(
        self,
        workdir: Path,
        first_step: int,
        last_step: int,
        *,
        tensorboard: bool,
        progress: bool,
        silent: bool,
    ):
        """Open the files of a run.

        Args:
            workdir: folder of the run.
            first_step: step after which the run continues.
            last_step: last step of the run, for the progress bar.
            tensorboard: write TensorBoard events too.
            progress: show a progress bar on stderr.
            silent: discard everything (all processes but the lead).
        """
        self._silent = silent
        if silent:
            return
        self._file = MetricsFile(workdir / "metrics.jsonl", first_step)
        self._events = None
        if tensorboard:
            self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1)
        self._bar = tqdm(
            total=last_step,
            initial=first_step,
            unit="step",
            file=sys.stderr,
            disable=not progress,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 15,
        )

    def step(self, step: int, values: Mapping[str, float], written: bool) -> None:
        """Show the metrics of a training step; write them to the files if `written`."""
        if self._silent:
            return
        if written:
            self.write(step, values)
        self._bar.update(step - self._bar.n)
        self._bar.set_postfix(
            loss=f"{values['loss']:.4f}",
            tok_s=f"{values['tokens_per_second']:,.0f}",
            refresh=False,
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write metrics of a step, of training or of an evaluation, to the files."""
        if self._silent:
            return
        self._file.write(step, values)
        if self._events is not None:
            for name, value in values.items():
                tag = name if "/" in name else f"train/{name}"
                self._events.add_scalar(tag, value, step)

    def print_line(self, message: str) -> None:
        """Print a line on stderr without breaking the progress bar."""
        if not self._silent and not self._bar.disable:
            self._bar.write(message, file=sys.stderr)

    def flush(self) -> None:
        """Flush metrics.jsonl."""
        if not self._silent:
            self._file.flush()

    def sync(self) -> None:
        """Write everything to the disk, and to the bucket of the run if it is in one."""
        if self._silent:
            return
        self._file.sync()
        if self._events is not None:
            self._events.flush()
        upload_changes()

    def close(self) -> None:
        """Close the files and the progress bar."""
        if self._silent:
            return
        self._bar.close()
        self._file.close()
        if self._events is not None:
            self._events.close()
