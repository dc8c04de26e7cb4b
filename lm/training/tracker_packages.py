"""Third-party trackers: Weights & Biases, MLflow and Trackio.

They write into the workdir and use no network unless their environment variables say so:
WANDB_MODE, WANDB_PROJECT and WANDB_DIR, MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME,
TRACKIO_PROJECT, TRACKIO_DIR and TRACKIO_SPACE_ID. Packages are imported when a run starts.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lm.config import flatten
from lm.errors import missing_package
from lm.storage import storage_path
from lm.training.trackers import tagged

PROJECT = "lm"


class Wandb:
    """Weights & Biases; upload later with `wandb sync WORKDIR/wandb/offline-run-*`."""

    def __init__(self, workdir: Path, first_step: int, config: ConfigDict):
        """Open or resume the run."""
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
        """Do nothing: wandb's own process writes."""

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class Mlflow:
    """MLflow file store; view with `mlflow ui --backend-store-uri WORKDIR/mlruns`.

    Set MLFLOW_TRACKING_URI to use a server. The file store requires MLFLOW_ALLOW_FILE_STORE=true,
    which is set here.
    """

    def __init__(self, workdir: Path, first_step: int, config: ConfigDict):
        """Open or resume the run."""
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
        """Do nothing: each step is written immediately."""

    def close(self) -> None:
        """Finish the run."""
        self._client.set_terminated(self._run)


class Trackio:
    """Trackio; view with `TRACKIO_DIR=WORKDIR/trackio trackio show`."""

    def __init__(self, workdir: Path, first_step: int, config: ConfigDict):
        """Open or resume the run."""
        os.environ.setdefault("TRACKIO_DIR", str(workdir.resolve() / "trackio"))  # read at import
        trackio, *others = map(_package, ("trackio", "trackio.run", "trackio.utils"))
        for module in (trackio, *others):
            module.print = lambda *_, **__: None  # Trackio has no quiet option
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
        """Do nothing: Trackio's own thread writes."""

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def _identity(workdir: Path) -> str:
    """Return a run id that stays the same across restarts."""
    return hashlib.sha256(str(storage_path(workdir)).encode()).hexdigest()[:16]


def _package(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("mlflow", "mlflow-skinny")
        raise missing_package("it", package, "trackers") from error
