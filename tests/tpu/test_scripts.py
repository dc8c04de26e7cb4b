"""The scripts of tpu/ with a stand-in for gcloud that really runs the workers' commands."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WHERE = ["--name", "job", "--zone", "us-east5-a"]
TRAIN = ["--", "train", "--config", "experiments/gpt2.py:124m", "--workdir", "/mnt/a run"]
SLICE = [*WHERE, "--type", "v5p-16", "--poll", "0.1"]


class Cloud:
    """A folder of stand-ins; `lm` is what the workers run in place of it."""

    def __init__(self, folder: Path, lm: str = "exit 0"):
        self.folder = folder
        (folder / "bin").mkdir()
        self._program(
            "gcloud", f'exec {sys.executable} {Path(__file__).parent}/fake_gcloud.py "$@"'
        )
        self._program("lm", f'echo "$@" >>$FAKE/started\n{lm}')
        path = f"{folder / 'bin'}:{os.environ['PATH']}"
        self.environment = os.environ | {
            "PATH": path,
            "FAKE": str(folder),
            "LM": f"{folder}/bin/lm",
        }

    def _program(self, name: str, body: str) -> None:
        (self.folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (self.folder / "bin" / name).chmod(0o755)

    def start(self, script: str, *words: str) -> subprocess.Popen:
        return subprocess.Popen(
            [ROOT / "tpu" / script, *words],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, *words: str) -> tuple[int, str, str]:
        process = self.start(script, *words)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def calls(self, verb: str) -> list[list[str]]:
        file = self.folder / "calls"
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [row for row in rows if row[1] == verb]

    def started(self) -> list[str]:
        file = self.folder / "started"
        return file.read_text().splitlines() if file.exists() else []

    @property
    def there(self) -> bool:
        """Whether something is left that costs money."""
        return (self.folder / "state").exists()


@pytest.fixture
def cloud(tmp_path) -> Cloud:
    return Cloud(tmp_path)


# What the workers run: the n-th start of all (two workers a start) decides.
STARTS = "n=$(wc -l <$FAKE/started); "


def test_from_nothing_to_a_finished_run_and_nothing_left(cloud):
    code, _, err = cloud.run("train.sh", *SLICE, *TRAIN)
    assert code == 0, err
    assert not cloud.there
    assert cloud.started() == ["train --config experiments/gpt2.py:124m --workdir /mnt/a run"] * 2
    assert len(cloud.calls("create")) == len(cloud.calls("delete")) == 1
    assert "v2-alpha-tpuv5" in cloud.calls("create")[0]


def test_several_slices_are_one_queued_resource(cloud):
    code, _, err = cloud.run("train.sh", *SLICE, "--slices", "3", "--spot", *TRAIN)
    assert code == 0, err
    (create,) = cloud.calls("create")
    assert " ".join(create).count("--node-prefix job --node-count 3") == 1
    assert "--spot" in create
    assert len(cloud.started()) == 6


@pytest.mark.parametrize("verb", ["create", "scp"])
def test_failed_build_leaves_no_files(cloud, verb):
    (cloud.folder / f"fail-{verb}").write_text("no quota\n" * 9)
    code, _, err = cloud.run("train.sh", *SLICE, *TRAIN)
    assert code not in (0, 75)
    assert "no quota" in err
    assert not cloud.there
    assert cloud.started() == []


def test_worker_that_cannot_install_ends_it(cloud):
    code, _, _ = cloud.run("train.sh", *SLICE, "--prepare", "[ $(basename $PWD) = job-0 ]", *TRAIN)
    assert code not in (0, 75)
    assert not cloud.there
    assert cloud.started() == []


@pytest.mark.parametrize("code", [75, 134])
def test_run_that_is_stopped_or_breaks_starts_again_on_the_same_slice(tmp_path, code):
    cloud = Cloud(tmp_path, f"{STARTS} [ $n -gt 2 ] || exit {code}")
    assert cloud.run("train.sh", *SLICE, *TRAIN)[0] == 0
    assert len(cloud.started()) == 4
    assert len(cloud.calls("create")) == 1
    assert not cloud.there


def test_supervisor_gives_up_eventually(tmp_path):
    cloud = Cloud(tmp_path, "exit 1")
    code, _, err = cloud.run("train.sh", *SLICE, "--restarts", "1", *TRAIN)
    assert (code, len(cloud.started()), cloud.there) == (1, 4, False)
    assert "error: gave up after 1 restarts" in err


def test_users_error_is_not_repeated(tmp_path):
    cloud = Cloud(tmp_path, "exit 2")
    code, _, err = cloud.run("train.sh", *SLICE, *TRAIN)
    assert (code, len(cloud.started()), cloud.there) == (2, 2, False)
    assert "error: a user's error" in err


@pytest.mark.parametrize("state", ["SUSPENDED", ""])
def test_slice_that_is_preempted_or_deleted_under_us_is_made_anew(tmp_path, state):
    gone = f"echo {state} >$FAKE/state" if state else "rm $FAKE/state; rm -r $FAKE/workers"
    cloud = Cloud(tmp_path, f"{STARTS} [ $n -gt 2 ] && exit 0; sleep 1; {gone}; sleep 60")
    code, _, err = cloud.run("train.sh", *SLICE, *TRAIN)
    assert code == 0, err
    assert len(cloud.calls("create")) == 2
    assert len(cloud.started()) == 4
    assert not cloud.there


def test_request_to_stop_lets_the_workers_save(tmp_path):
    cloud = Cloud(tmp_path, "trap 'touch $FAKE/saved; exit 75' TERM; sleep 60 & wait $!")
    process = cloud.start("train.sh", *SLICE, *TRAIN)
    until = time.monotonic() + 30
    while len(cloud.started()) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert (tmp_path / "saved").exists()
    assert not cloud.there


def test_keep_keeps_and_delete_deletes(cloud):
    assert cloud.run("train.sh", *SLICE, "--keep", *TRAIN)[0] == 0
    assert cloud.there
    assert cloud.run("run.sh", *WHERE, "--", "touch", "a b")[0] == 0
    assert (cloud.folder / "workers" / "job-1" / "a b").exists()
    assert cloud.run("delete.sh", *WHERE)[0] == 0
    assert not cloud.there


def test_dry_run_prints_the_commands_and_calls_nothing(cloud):
    code, out, err = cloud.run("train.sh", *SLICE, "--project", "p", "--dry_run", *TRAIN)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == (
        "gcloud compute tpus queued-resources create job --zone us-east5-a --project p "
        "--node-id job --accelerator-type v5p-16 --runtime-version v2-alpha-tpuv5 "
    )
    verbs = [line.split()[3:5] for line in lines]
    assert verbs == [
        ["queued-resources", "create"],
        ["tpu-vm", "scp"],
        *[["tpu-vm", "ssh"]] * 3,
        ["queued-resources", "delete"],
    ]
    assert not (cloud.folder / "calls").exists()


def test_every_script_has_help_and_a_dry_run_that_changes_nothing(cloud, tmp_path):
    scripts = sorted((ROOT / "tpu").glob("*.sh"))
    assert len(scripts) > 6
    for script in scripts:
        if script.name == "common.sh":
            continue
        code, out, err = cloud.run(script.name, "--help")
        assert (code, err) == (0, ""), script
        assert script.name in out
        assert "--dry_run" in out
    for words in (["start", "train", "--workdir", "a b"], ["status"], ["stop"]):
        code, out, err = cloud.run("worker.sh", "--dry_run", *words)
        assert (code, err) == (0, "")
        assert out
    assert not (cloud.folder / "calls").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([*WHERE, *TRAIN], "--type TYPE is missing"),
        (["--name", "job", *TRAIN], "--zone ZONE is missing"),
        ([*SLICE], "after -- comes"),
        ([*SLICE, "--slizes", "2", *TRAIN], "unknown option --slizes"),
        ([*WHERE, "--type"], "--type needs a value"),
        ([*WHERE, "--type", "v9-8", *TRAIN], "no runtime is known for --type v9-8"),
    ],
)
def test_wrong_words_are_one_line_errors(cloud, words, expected):
    code, _, err = cloud.run("train.sh", *words)
    assert code == 2
    assert expected in err
    assert cloud.calls("create") == []


def test_scripts_are_shellcheck_clean():
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=f"{sys.prefix}/bin")
    if not shellcheck:
        pytest.skip("shellcheck is not installed")
    scripts = [*ROOT.glob("tpu/*.sh"), *ROOT.glob("scripts/*.sh"), *ROOT.glob("scripts/*.sbatch")]
    done = subprocess.run([shellcheck, *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
