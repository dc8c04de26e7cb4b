"""External trackers: offline, resumed under the same run, and never blocking."""

from __future__ import annotations

import json
import math
import os
import sqlite3
import subprocess
import sys

import pytest

from lm.config import load_config
from lm.config.registries import TRACKERS
from lm.errors import UserError
from lm.training import tracker_packages
from lm.training.trackers import open_trackers

ROWS = [
    (1, {"loss": 3.0, "learning_rate": 0.1}),
    (2, {"loss": math.nan, "learning_rate": 0.2}),
    (2, {"eval/validation/loss": 2.5}),
]
# Two starts of a run, each in a process of its own as trackers have global state.
STARTS = """
import sys
from pathlib import Path
from lm.config import load_config
from lm.training.trackers import open_trackers
name, workdir, first, rows = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), eval(sys.argv[4])
config = load_config("experiments/stdlib.py", {"log.trackers": name, "log.tensorboard": "False"})
(tracker,) = open_trackers(workdir, first, config)
for step, values in rows:
    tracker.write(step, values)
tracker.flush()
tracker.close()
"""
VARIABLES = ("WANDB_", "MLFLOW_", "TRACKIO_")


def start(name, workdir, first, rows):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(VARIABLES)}
    environment = kept | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    text = repr(rows).replace("nan", "float('nan')")
    words = [sys.executable, "-c", STARTS, name, str(workdir), str(first), text]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_metrics_of_two_starts_are_merged_silently(name, tmp_path, monkeypatch):
    pytest.importorskip(name)
    workdir = tmp_path / "my run"
    workdir.mkdir()
    for first, rows in ((0, ROWS), (2, [(3, {"loss": 1.0})])):
        done = start(name, workdir, first, rows)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    READ[name](workdir, monkeypatch)
    assert {path.name for path in tmp_path.iterdir()} == {"my run"}


def read_wandb(workdir, monkeypatch):
    folders = sorted((workdir / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert len({folder.name.rpartition("-")[2] for folder in folders}) == 1
    assert all(list(folder.glob("*.wandb")) for folder in folders)


def read_mlflow(workdir, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    client = MlflowClient((workdir / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("lm")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "my run"
    assert run.info.status == "FINISHED"
    assert run.data.params["model.d_model"].isdigit()
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history if m.step != 2] == [(1, 3.0), (3, 1.0)]
    (validation,) = client.get_metric_history(run.info.run_id, "eval/validation/loss")
    assert (validation.step, validation.value) == (2, 2.5)


def read_trackio(workdir, monkeypatch):
    (file,) = (workdir / "trackio").glob("*.db")
    rows = sqlite3.connect(file).execute("select run_name, step, metrics from metrics").fetchall()
    assert {name for name, _, _ in rows} == {"my run"}
    found = [(step, json.loads(text)) for _, step, text in rows]
    assert (1, {"train/loss": 3.0, "train/learning_rate": 0.1}) in found
    assert (2, {"eval/validation/loss": 2.5}) in found
    assert (3, {"train/loss": 1.0}) in found


READ = {"wandb": read_wandb, "mlflow": read_mlflow, "trackio": read_trackio}


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_package_that_is_missing_is_a_one_line_error(name, tmp_path, monkeypatch, capsys):
    for module in (name, "mlflow.entities"):
        monkeypatch.setitem(sys.modules, module, None)
    assert f"{name} failed (it needs the package `{name}" in lines_of(name, tmp_path, capsys)


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_tracker_that_raises_is_a_one_line_error(name, tmp_path, monkeypatch, capsys):
    def raises(module):
        raise RuntimeError("no network")

    monkeypatch.setattr(tracker_packages, "_package", raises)
    lines = lines_of(name, tmp_path, capsys)
    assert lines == f"{name} failed (no network): training continues without it\n"


def lines_of(name, workdir, capsys):
    values = {"log.trackers": name, "log.tensorboard": "False"}
    (tracker,) = open_trackers(workdir, 0, load_config("experiments/stdlib.py", values))
    for step, row in ROWS:
        tracker.write(step, row)
    tracker.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_unknown_trackers_are_an_error_with_the_known_names():
    assert set(TRACKERS) == {"wandb", "mlflow", "trackio"}
    config = load_config("experiments/stdlib.py", {"log.trackers": "wandb, mlflow"})
    assert config.log.trackers == "wandb, mlflow"
    with pytest.raises(UserError, match="unknown tracker 'wandv'; did you mean wandb"):
        load_config("experiments/stdlib.py", {"log.trackers": "mlflow,wandv"})
