"""`lm` in a separate process, and the output of runs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from lm import experiment
from lm.runs.checkpoints import Checkpoints
from lm.runs.workdir import load_run_config


def arguments(experiment_file: Path, workdir: Path, **config: object) -> list[str]:
    """The words of an `lm train` command; `a__b` stands for the key a.b."""
    overrides = [f"--config.{key.replace('__', '.')}={value}" for key, value in config.items()]
    return ["train", "--config", str(experiment_file), "--workdir", str(workdir), *overrides]


LM = [sys.executable, "-m", "lm"]


def start(words: list[str], begin: list[str] = LM) -> subprocess.Popen:
    """Start `lm` in a process of its own."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [*begin, *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def together(
    *words: list[str], processes: int = 2, begin: list[str] = LM
) -> list[subprocess.Popen]:
    """Start `lm` as processes of one run, each with the words of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = ["--cpu_devices", "1", "--coordinator", f"127.0.0.1:{port}"]
    common += ["--num_processes", str(processes)]
    return [start([*each, *common, "--process_id", str(i)], begin) for i, each in enumerate(words)]


def wait_for_step(workdir: Path, step: int, process: subprocess.Popen) -> None:
    """Return as soon as the run has written a step, or has ended."""
    file = workdir / "metrics.jsonl"
    while process.poll() is None:
        if file.exists() and any(f'"step": {step},' in line for line in file.open()):
            return
        time.sleep(0.005)


def finish(*processes: subprocess.Popen, code: int = 0) -> list[str]:
    """Wait for processes; what they printed."""
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == code, output
    return outputs


def losses(workdir: Path) -> dict[int, float]:
    """Return the training loss of every step; a repeated step is an error."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    assert len(steps) == len(set(steps)), "a step was written twice"
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def saved_state(workdir: Path) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint, by its path."""
    config = load_run_config(workdir, {})
    built = experiment.build(config, jax.devices())
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint, {})
    state = checkpoints.restore(built.state_shapes, built.state_sharding, pytest.fail)
    checkpoints.close()
    leaves = jax.tree.leaves_with_path(jax.device_get(state))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def evaluations(workdir: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    name = "eval/validation/loss"
    return {row["step"]: row[name] for row in rows if name in row}
