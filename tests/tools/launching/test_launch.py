"""`lm launch`: its commands, and a training run whose processes are killed or freeze."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lm.cli import main
from lm.tools.launching.supervise import (
    gpu_share,
    newest_checkpoint,
    process_commands,
    record_incident,
)

TRAIN = ["train", "--config", "x.py", "--workdir", "w", "--config.seed=1"]


def test_each_process_gets_its_index():
    made = process_commands(TRAIN, 3, 1234)
    assert [words[-1] for words in made] == ["0", "1", "2"]
    for words in made:
        assert words[2:9] == ["lm", *TRAIN]
        assert words[9:13] == ["--coordinator", "127.0.0.1:1234", "--num_processes", "3"]
    assert process_commands(TRAIN, 1, 1234)[0][2:] == ["lm", *TRAIN]


def test_gpus_are_split_evenly(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    shares = [gpu_share(i, 2, 4)["CUDA_VISIBLE_DEVICES"] for i in range(2)]
    assert shares == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert gpu_share(1, 4, 4) == {"CUDA_VISIBLE_DEVICES": "5"}
    assert gpu_share(0, 2, 0) == {}


def test_only_whole_checkpoints_count(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for name in ("9", "10", "11.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_checkpoint(tmp_path) == 10


def test_incidents_that_cannot_be_written_stop_nothing(tmp_path, capsys):
    record_incident(tmp_path, "one")
    record_incident(tmp_path, "two")
    file = tmp_path / "incidents.jsonl"
    assert [json.loads(line)["incident"] for line in file.open()] == ["one", "two"]
    file.unlink()
    file.mkdir()
    record_incident(tmp_path, "three")
    record_incident(None, "four")
    said = capsys.readouterr().err
    assert "launch: three\nlaunch: incidents.jsonl: [Errno 21] Is a directory" in said
    assert said.endswith("launch: four\n")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["launch", "--processes", "2", "train"], "unrecognized arguments"),
        (["launch", "--processes", "2"], "lm launch needs a command"),
        (["launch", "--processes", "2", "--", "params"], "-- must be followed by train"),
        (["launch", "--processes", "2", "--"], "-- must be followed by train"),
        (["launch", "--processes", "0", "--", *TRAIN], "not a number of at least 1"),
        (["launch", "--processes", "2", "--", *TRAIN, "--process_id=0"], "sets --process_id"),
        (["launch", "--processes", "2", "--gpus", "3", "--", *TRAIN], "not divisible"),
        (["launch", "--processes", "2", "--config.seed=1", "--", *TRAIN], "goes after --"),
        (["params", "--config", "x.py", "--", "y"], "takes no arguments after --"),
    ],
)
def test_wrong_command_is_a_one_line_error(capsys, words, expected):
    assert main(words) == 2
    assert expected in capsys.readouterr().err


@pytest.fixture
def sums(tmp_path) -> list[str]:
    """Return the words of a tiny run of 40 steps, without the value of --workdir."""
    (tmp_path / "sums.txt").write_text("".join(f"{i} + 7 = {i + 7}\n" for i in range(1500)))
    small = {
        "data.source": f"text:{tmp_path}/sums.txt",
        "model.n_layers": 1,
        "model.d_model": 16,
        "model.n_heads": 2,
        "data.tokenizer": "byte",
        "data.sequence_length": 16,
        "data.batch_size": 4,
        "train.steps": 40,
        "checkpoint.every_steps": 5,
        "log.tensorboard": False,
    }
    body = "\n".join(f"    config.{key} = {value!r}" for key, value in small.items())
    (tmp_path / "sums.py").write_text(
        "from lm.config import default\n\n\ndef get_config():\n"
        f"    config = default()\n{body}\n    return config\n"
    )
    return ["train", "--config", str(tmp_path / "sums.py"), "--cpu_devices", "1", "--workdir"]


def start(*words: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "lm", "launch", "--backoff", "0.1", *map(str, words)],
        stderr=subprocess.PIPE,
        text=True,
    )


def losses(workdir: Path) -> dict[int, float]:
    file = workdir / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines(True) if line[-1] == "\n"]
    assert len({row["step"] for row in rows if "loss" in row}) == sum("loss" in r for r in rows)
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def processes_of(workdir: Path) -> list[int]:
    """Return the ids of the training processes of a run, by their command lines."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if str(workdir).encode() in words and b"launch" not in words:
                found.append(int(entry.name))
    return found


def wait_for_step(workdir: Path, step: int) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if (workdir / "metrics.jsonl").exists() and step <= max(losses(workdir), default=0):
            return
        time.sleep(0.02)
    pytest.fail(f"step {step} was not reached")


@pytest.mark.skipif(sys.platform != "linux", reason="finds its processes in /proc")
def test_killed_and_frozen_processes_change_no_loss(sums, tmp_path):
    calm, shaken = tmp_path / "calm", tmp_path / "shaken"
    process = start("--processes", 2, "--", *sums, calm)
    assert process.wait() == 0, process.stderr.read()

    heartbeat = ["--heartbeat_seconds", "3"]
    process = start("--processes", 2, "--", *sums, shaken, *heartbeat)
    wait_for_step(shaken, 7)
    os.kill(processes_of(shaken)[1], signal.SIGKILL)
    wait_for_step(shaken, 20)
    os.kill(processes_of(shaken)[0], signal.SIGSTOP)
    assert process.wait(120) == 0, process.stderr.read()
    assert losses(shaken) == losses(calm)
    assert list(losses(shaken)) == list(range(1, 41))
    incidents = (shaken / "incidents.jsonl").read_text().splitlines()
    assert len(incidents) == 2
    assert "was killed by SIGKILL" in incidents[0]
    assert "exited with 1 (error: process 0 of the run does not respond" in incidents[1]
