"""Trackers: where a run's metrics go beside metrics.jsonl. None of them can stop training.

Those of other projects write into the workdir and need no network, unless their own environment
variables say otherwise: WANDB_MODE, WANDB_PROJECT and WANDB_DIR, MLFLOW_TRACKING_URI and
MLFLOW_EXPERIMENT_NAME, TRACKIO_PROJECT, TRACKIO_DIR and TRACKIO_SPACE_ID.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ml_collections import ConfigDict
from tqdm import tqdm

from lm.config import flatten
from lm.config.registries import TRACKERS
from lm.config.registry import listed
from lm.errors import missing_package
from lm.storage import storage_path

PROJECT = "lm"
_WAITING_ROWS = 10_000
_WAIT_SECONDS = 10.0  # for a tracker that takes no row, or does not end
_FLUSH_SECONDS = 120.0


class Tracker(Protocol):
    """Program that shows or keeps metrics; a method that raises ends its part in the run."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take the metrics of a step."""

    def flush(self) -> None:
        """Write what was taken to the disk."""

    def close(self) -> None:
        """Write the rest and end."""


def open_trackers(workdir: Path, first_step: int, config: ConfigDict) -> list[BackgroundTracker]:
    """Start the trackers that a configuration names.

    Args:
        workdir: folder of the run.
        first_step: step after which the run continues.
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
    """Tracker in a thread of its own; one that fails or hangs is said once and left out."""

    def __init__(self, name: str, make: Callable[[], Tracker]):
        """Start the thread, which calls `make` for the tracker.

        Args:
            name: name for the message.
            make: opens the tracker.
        """
        self._name, self._make = name, make
        self._calls: queue.Queue = queue.Queue(_WAITING_ROWS)
        self._failed = False
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"lm-{name}")
        self._thread.start()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Hand over the metrics of a step."""
        self._call("write", step, dict(values))

    def flush(self) -> None:
        """Ask for what was handed over to be written to the disk; does not wait for it."""
        self._call("flush")

    def close(self) -> None:
        """Wait until the tracker has ended, some seconds at most."""
        self._call("close")
        self._thread.join(0 if self._failed else _WAIT_SECONDS)
        if self._thread.is_alive():
            self._fail("it does not end")

    def _call(self, *call: Any) -> None:
        if not self._failed:
            try:
                self._calls.put(call, timeout=_WAIT_SECONDS)
            except queue.Full:
                self._fail("it takes no more metrics")

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
            line = f"{self._name} fails ({problem}): training goes on without it"
            tqdm.write(line, file=sys.stderr)


class TensorBoard:
    """Event files of TensorBoard.

    Written here rather than by tensorboardX's own thread, whose end, on a full disk, blocks all
    that write to it.
    """

    def __init__(self, folder: Path, first_step: int):
        """Open a new file; TensorBoard drops the earlier events of steps after `first_step`."""
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
        """Write the events to the disk."""
        self._file.flush()
        self._flushed_at = time.monotonic()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Wandb:
    """Weights & Biases: `wandb sync WORKDIR/wandb/offline-run-*` sends it later."""

    def __init__(self, workdir: Path, first_step: int, config: ConfigDict):
        """Open the run, or continue it."""
        wandb = _package("wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=workdir.name,
            id=_identity(workdir),
            resume="allow",
            dir=os.environ.get("WANDB_DIR", str(workdir)),
            mode=os.environ.get("WANDB_MODE", "offline"),
            config=config.to_dict(),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the metrics of a step."""
        self._run.log(tagged(values), step=step)

    def flush(self) -> None:
        """Do nothing: its own process writes."""

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class Mlflow:
    """MLflow, in files: `mlflow ui --backend-store-uri WORKDIR/mlruns` shows them.

    A server is named by MLFLOW_TRACKING_URI. MLflow asks for MLFLOW_ALLOW_FILE_STORE=true where
    files are used.
    """

    def __init__(self, workdir: Path, first_step: int, config: ConfigDict):
        """Open the run, or continue it."""
        entities = _package("mlflow.entities")
        self._metric = entities.Metric
        local = (workdir / "mlruns").resolve().as_uri()
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        uri = os.environ.get("MLFLOW_TRACKING_URI", local)
        self._client = _package("mlflow.tracking").MlflowClient(uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        known = f"tags.lm_run = '{_identity(workdir)}'"
        runs = self._client.search_runs([experiment], known, max_results=1)
        if runs:
            self._run = runs[0].info.run_id
            self._client.update_run(self._run, "RUNNING")
            return
        tags = {"mlflow.runName": workdir.name, "lm_run": _identity(workdir)}
        self._run = self._client.create_run(experiment, tags=tags).info.run_id
        params = [entities.Param(key, str(x)[:500]) for key, x in flatten(config)]
        for start in range(0, len(params), 100):
            self._client.log_batch(self._run, params=params[start : start + 100])

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the metrics of a step."""
        now = round(1000 * time.time())
        names = {re.sub(r"[^\w\-./ ]", "_", tag): value for tag, value in tagged(values).items()}
        metrics = [self._metric(name, value, now, step) for name, value in names.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def flush(self) -> None:
        """Do nothing: every step is written at once."""

    def close(self) -> None:
        """Finish the run."""
        self._client.set_terminated(self._run)


class Trackio:
    """Trackio: `TRACKIO_DIR=WORKDIR/trackio trackio show` shows it."""

    def __init__(self, workdir: Path, first_step: int, config: ConfigDict):
        """Open the run, or continue it."""
        os.environ.setdefault("TRACKIO_DIR", str(workdir.resolve() / "trackio"))  # read at import
        trackio, *others = map(_package, ("trackio", "trackio.run", "trackio.utils"))
        for module in (trackio, *others):
            module.print = lambda *_, **__: None  # it has no option for silence
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=workdir.name,
            config=dict(flatten(config)),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the metrics of a step."""
        self._run.log(tagged(values), step=step)

    def flush(self) -> None:
        """Do nothing: its own thread writes."""

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def tagged(values: Mapping[str, float]) -> dict[str, float]:
    """Return metrics by their names in trackers, those of training below "train/"."""
    return {name if "/" in name else f"train/{name}": value for name, value in values.items()}


def _identity(workdir: Path) -> str:
    """Return a name of the run that its next start finds again."""
    return hashlib.sha256(str(storage_path(workdir)).encode()).hexdigest()[:16]


def _package(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("mlflow", "mlflow-skinny")
        raise missing_package("it", package, "trackers") from error
