"""Experiment trackers besides metrics.jsonl. A failing tracker never stops training."""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ml_collections import ConfigDict
from tqdm import tqdm

from lm.config.registries import TRACKERS
from lm.config.registry import listed

_WAITING_ROWS = 10_000
_WAIT_SECONDS = 10.0  # time limit for a tracker that hangs
_FLUSH_SECONDS = 120.0


class Tracker(Protocol):
    """Destination of metrics; a method that raises disables the tracker for this run."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the metrics of a step."""

    def flush(self) -> None:
        """Flush pending metrics to disk."""

    def close(self) -> None:
        """Flush and close."""


def open_trackers(workdir: Path, first_step: int, config: ConfigDict) -> list[BackgroundTracker]:
    """Start the trackers that a configuration names.

    Args:
        workdir: folder of the run.
        first_step: step from which the run continues.
        config: configuration of the run.
    """
    makers: dict[str, Callable[[], Tracker]] = {
        name: partial(TRACKERS[name], workdir, first_step, config)
        for name in listed(config.log.trackers)
    }
    if config.log.tensorboard:
        makers["TensorBoard"] = partial(TensorBoard, workdir / "tensorboard", first_step)
    return [BackgroundTracker(name, make) for name, make in makers.items()]


class BackgroundTracker:
    """Tracker in a separate thread; a failure or hang is reported once and disables it."""

    def __init__(self, name: str, make: Callable[[], Tracker]):
        """Start the thread, which creates the tracker with `make`.

        Args:
            name: name for messages.
            make: creates the tracker.
        """
        self._name, self._make = name, make
        self._calls: queue.Queue = queue.Queue(_WAITING_ROWS)
        self._failed = False
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"lm-{name}")
        self._thread.start()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Queue the metrics of a step."""
        self._call("write", step, dict(values))

    def flush(self) -> None:
        """Request a flush to disk, without waiting for it."""
        self._call("flush")

    def close(self) -> None:
        """Wait a few seconds for the tracker to finish."""
        self._call("close")
        self._thread.join(0 if self._failed else _WAIT_SECONDS)
        if self._thread.is_alive():
            self._fail("it does not finish")

    def _call(self, *call: Any) -> None:
        if not self._failed:
            try:
                self._calls.put(call, timeout=_WAIT_SECONDS)
            except queue.Full:
                self._fail("its queue is full")

    def _run(self) -> None:
        tracker, method = None, ""
        try:
            tracker = self._make()
            while method != "close":
                method, *arguments = self._calls.get()
                getattr(tracker, method)(*arguments)
        except Exception as error:
            self._fail(" ".join(str(error).split())[:200] or type(error).__name__)
            with contextlib.suppress(Exception):
                if tracker is not None:
                    tracker.close()

    def _fail(self, problem: str) -> None:
        if not self._failed:
            self._failed = True
            line = f"{self._name} failed ({problem}): training continues without it"
            tqdm.write(line, file=sys.stderr)


class TensorBoard:
    """TensorBoard event files.

    Written directly rather than through tensorboardX's writer thread, which blocks all callers when
    it dies on a full disk.
    """

    def __init__(self, folder: Path, first_step: int):
        """Open a new event file; TensorBoard drops earlier events of steps after `first_step`."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import Summary, scalar

        self._event, self._summary, self._scalar = Event, Summary, scalar
        folder.mkdir(parents=True, exist_ok=True)
        self._file = EventsWriter(str(folder / "events"))
        start = SessionLog(status=SessionLog.START)
        for content in ({"file_version": "brain.Event:2"}, {"session_log": start}):
            self._file.write_event(Event(step=first_step + 1, wall_time=time.time(), **content))
        self._flushed_at = 0.0

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write an event with the metrics of a step."""
        summary = self._summary()
        for tag, value in tagged(values).items():
            summary.MergeFrom(self._scalar(tag, value))
        self._file.write_event(self._event(step=step, wall_time=time.time(), summary=summary))
        if time.monotonic() - self._flushed_at > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Flush events to disk."""
        self._file.flush()
        self._flushed_at = time.monotonic()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def tagged(values: Mapping[str, float]) -> dict[str, float]:
    """Prefix the names of training metrics with "train/", for trackers."""
    return {name if "/" in name else f"train/{name}": value for name, value in values.items()}
