"""scripts/train.sbatch with stand-ins for srun and scontrol: when jobs are requeued."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.sbatch"


@pytest.fixture
def start(tmp_path):
    """Start the batch script; srun runs its command, `lm` is a shell program."""
    (tmp_path / "bin").mkdir()
    log = tmp_path / "log"
    programs = {
        "srun": f'echo "srun $*" >>{log}; [ "$1" = --kill-on-bad-exit=0 ] && shift; exec "$@"',
        "scontrol": f'echo "scontrol $*" >>{log}',
    }

    def begin(lm: str, **variables: str) -> subprocess.Popen:
        for name, body in {**programs, "lm": lm}.items():
            (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        own = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "LM": "lm"}
        environment = os.environ | own | {"SLURM_SUBMIT_DIR": str(tmp_path)} | variables
        words = [SCRIPT, "train", "--workdir", "a b"]
        return subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)

    begin.log = log
    return begin


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [(0, "", 0), (2, "", 0), (75, "99", 1), (1, "", 1), (134, "9", 1), (1, "10", 0)],
)
def test_requeued_slices(start, code, restarts, again):
    process = start(f"exit {code}", **({"SLURM_RESTART_COUNT": restarts} if restarts else {}))
    _, err = process.communicate(timeout=20)
    assert process.returncode == code
    lines = start.log.read_text().splitlines()
    assert lines[0] == "srun --kill-on-bad-exit=0 lm train --workdir a b"
    assert lines[1:] == ["scontrol requeue 7"] * again
    assert ("error: gave up" in err) == (restarts == "10")


def test_dry_run_prints_commands_and_runs_nothing(start, tmp_path):
    words = ["bash", SCRIPT, "--dry_run", "train", "--workdir", "a b"]
    environment = os.environ | {"LM": "my lm", "SLURM_SUBMIT_DIR": str(tmp_path)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert "sbatch: --requeue" in lines
    assert "srun --kill-on-bad-exit=0 my lm train --workdir a\\ b " in lines
    assert lines[-1].startswith('scontrol requeue "$SLURM_JOB_ID"')
    assert not start.log.exists()
    for asked, code in ((["--help"], 0), ([], 2)):
        done = subprocess.run(["bash", SCRIPT, *asked], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (code, "")
        assert "scripts/train.sbatch --dry_run train" in done.stdout


def test_signal_before_the_time_limit_saves_and_queues_again(start, tmp_path):
    process = start(
        f"trap 'sleep .5; touch {tmp_path}/saved; exit 75' TERM; sleep 9 2>&- & wait $!"
    )
    until = time.monotonic() + 10
    while not start.log.exists() and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 75
    assert (tmp_path / "saved").exists()
    assert start.log.read_text().splitlines()[1] == "scontrol requeue 7"
