"""`lm sweep` with a stand-in for training: whatever is killed, every run finishes once."""

from __future__ import annotations

import csv
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lm.cli import main
from lm.errors import UserError
from lm.sweeps.sets import grid, named
from lm.sweeps.sweep import Halving, Sweep, load_sweep, make_runs
from lm.tools.launching import launchers
from lm.tools.launching.launchers import Local, Slurm, SlurmJob, Tpu, core_share
from lm.tools.launching.run_sweep import locked, run_sweep
from lm.tools.launching.supervise import gpu_share

FAKE = (sys.executable, str(Path(__file__).with_name("fake_lm.py")))
EXPERIMENT = "experiments/stdlib.py:tiny"
RATES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
HALVED = """
from lm.sweeps.sets import grid, named
from lm.sweeps.sweep import Halving, Sweep

def get_sweep(seeds="0"):
    sets = grid({{"seed": [int(s) for s in seeds.split("+")], "optimizer.learning_rate": {rates}}})
    return Sweep("{experiment}", named(sets), {halving})
"""


@pytest.fixture
def sweep_file(tmp_path) -> Path:
    file = tmp_path / "sweep.py"
    file.write_text(HALVED.format(rates=RATES, experiment=EXPERIMENT, halving=None))
    return file


def run(file: str | Path, folder: Path, parallel: int = 3, retries: int = 2, **steps) -> int:
    sweep, runs = load_sweep(str(file), folder, {"train.steps": "20"} | steps)
    with locked(folder) as lock:
        launcher = Local(parallel, lm=FAKE, keep_open=(lock,))
        return run_sweep(sweep, runs, folder, launcher, parallel, retries, poll_seconds=0.02)


def table(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "results.csv").open() as stream:
        return {row["run"]: row for row in csv.DictReader(stream)}


def starts(folder: Path, run: str) -> int:
    return len((folder / "runs" / run / "starts").read_text().splitlines())


def test_every_run_ends_once_with_its_own_results(sweep_file, tmp_path, capfd):
    assert run(sweep_file, tmp_path / "s") == 0
    rows = table(tmp_path / "s")
    assert [row["optimizer.learning_rate"] for row in rows.values()] == [str(r) for r in RATES]
    for row in rows.values():
        assert (row["state"], row["step"]) == ("done", "20")
        expected = 6 / float(row["optimizer.learning_rate"]) / 20
        assert float(row["eval/validation/loss"]) == expected
    assert "6 done" in capfd.readouterr().err

    assert run(sweep_file, tmp_path / "s") == 0  # a finished sweep starts nothing
    assert {starts(tmp_path / "s", name) for name in rows} == {1}


def test_failures_are_retried_and_then_reported_with_their_last_line(sweep_file, tmp_path, capfd):
    assert run(f"{sweep_file}:0+13+14+15", tmp_path / "s", parallel=8) == 1
    rows = table(tmp_path / "s")
    states = {seed: set() for seed in ("0", "13", "14", "15")}
    for row in rows.values():
        states[row["seed"]].add((row["state"], starts(tmp_path / "s", row["run"])))
    assert states["0"] == {("done", 1)}
    assert states["13"] == {("failed", 3)}
    assert states["14"] == {("done", 2)}
    assert states["15"] == {("failed", 1)}  # a user's error would only be repeated
    printed = capfd.readouterr().err
    assert "ValueError: it broke" in printed
    assert "error: --config.seed=15: an unlucky number" in printed


SWEEP_PROGRAM = """
import sys; sys.path.insert(0, {tests!r})
from pathlib import Path
from test_sweep import run
sys.exit(run({file!r}, Path({folder!r}), 4))
"""


def test_sigkill_of_the_sweep_and_of_runs_loses_and_repeats_nothing(sweep_file, tmp_path):
    file, calm, shaken = f"{sweep_file}:0+1", tmp_path / "calm", tmp_path / "shaken"
    assert run(file, calm, parallel=6) == 0
    chance = random.Random(5)
    tests = str(Path(__file__).parent)
    program = SWEEP_PROGRAM.format(tests=tests, file=file, folder=str(shaken))
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
        time.sleep(chance.uniform(0.5, 1.2))
        for note in shaken.glob("runs/*/starts"):
            if chance.random() < 0.2:
                pid = int(note.read_text().split()[-1])
                command = Path(f"/proc/{pid}/cmdline")
                if command.exists() and str(shaken).encode() in command.read_bytes():
                    os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()
    assert run(file, shaken) == 0
    assert (shaken / "results.csv").read_bytes() == (calm / "results.csv").read_bytes()
    for folder in (calm / "runs").iterdir():  # no step was written twice
        metrics = (shaken / "runs" / folder.name / "metrics.jsonl").read_text()
        assert metrics == (folder / "metrics.jsonl").read_text()


def test_sigterm_lets_runs_save_and_the_sweep_continues(sweep_file, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_SECONDS", "0.1")
    program = SWEEP_PROGRAM.format(
        tests=str(Path(__file__).parent), file=str(sweep_file), folder=str(tmp_path / "s")
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    while not list((tmp_path / "s").glob("runs/*/metrics.jsonl")):
        time.sleep(0.02)
    process.terminate()
    assert process.wait(30) == 75
    monkeypatch.setenv("FAKE_SECONDS", "0")
    assert run(sweep_file, tmp_path / "s") == 0


def test_halving_drops_the_worse_and_only_the_best_finishes(tmp_path):
    file = tmp_path / "halved.py"
    halving = "Halving(first=5, factor=2)"
    file.write_text(HALVED.format(rates=RATES, experiment=EXPERIMENT, halving=halving))
    assert run(file, tmp_path / "s", **{"train.steps": "40"}) == 0
    rows = table(tmp_path / "s")
    # The loss falls with the rate: 6 runs go to 5, the best 3 to 10, 2 to 20, 1 to the end.
    assert [row["step"] for row in rows.values()] == ["5", "5", "5", "10", "20", "40"]
    assert [row["state"] for row in rows.values()] == ["dropped"] * 5 + ["done"]
    before = (tmp_path / "s" / "results.csv").read_bytes()
    n = {name: starts(tmp_path / "s", name) for name in rows}
    assert run(file, tmp_path / "s", **{"train.steps": "40"}) == 0
    assert (tmp_path / "s" / "results.csv").read_bytes() == before
    assert n == {name: starts(tmp_path / "s", name) for name in rows}


def test_rungs_are_below_the_last_step():
    assert Halving(100, 3).rungs(1000) == [100, 300, 900]
    assert Halving(100, 3).rungs(900) == [100, 300]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("x = 1", "has no get_sweep"),
        ("def get_sweep():\n    return 3", "not a Sweep"),
        (
            "from lm.sweeps.sweep import Sweep\ndef get_sweep():\n    return Sweep('a', {})",
            "no runs",
        ),
        (
            "from lm.sweeps.sweep import Sweep\ndef get_sweep():\n"
            f"    return Sweep('{EXPERIMENT}', {{'a': {{'model.dmodel': 3}}}})",
            "run a: unknown key --config.model.dmodel",
        ),
        (
            "from lm.sweeps.sweep import Sweep\ndef get_sweep():\n"
            f"    return Sweep('{EXPERIMENT}', {{'1': {{}}, 1: {{}}}})",
            "would share the folder 1",
        ),
        (
            "from lm.sweeps.sweep import Sweep\ndef get_sweep():\n"
            f"    return Sweep('{EXPERIMENT}', {{'a': 3}})",
            "run a: its overrides are int",
        ),
        (
            "from lm.sweeps.sweep import Sweep\ndef get_sweep():\n    return Sweep('a', [{}])",
            "s.py: Sweep: runs is list, not Mapping",
        ),
        (
            "from lm.sweeps.sweep import Halving\ndef get_sweep():\n    return Halving(5, 1)",
            "s.py: Halving: factor=1 is below 2",
        ),
        (
            "from lm.sweeps.sweep import Search\ndef get_sweep():\n    return Search('a', 1, 2)",
            "s.py: Search: suggest is int, not Callable",
        ),
    ],
)
def test_wrong_sweep_file_is_a_one_line_error(tmp_path, capsys, body, expected):
    (tmp_path / "s.py").write_text(body)
    assert main(["sweep", "--config", f"{tmp_path}/s.py", "--workdir", f"{tmp_path}/s"]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "s" / "runs").exists()


def test_any_name_of_a_run_is_a_folder_of_its_own(tmp_path):
    names: list = ["a=1,b=é", 3, None, (1, 2), "", ".", "..", "../a", "/a", "-rf", "a\\b", "a\nb"]
    names += ["\udcff", "x" * 199, "x" * 300, "x" * 300 + "y", "é" * 150, "~", "a\0b"]
    sweep = Sweep(EXPERIMENT, {name: {} for name in names})
    runs = list(make_runs(sweep, tmp_path, {}, ()))
    assert [run.name for run in runs[:2]] == ["a=1,b=é", "3"]  # good names stay
    for run in runs:
        run.workdir.mkdir(parents=True)
        assert run.workdir.parent == tmp_path / "runs"
        (tmp_path / f".{run.name}.json.tmp").touch()
    assert len(list((tmp_path / "runs").iterdir())) == len(names)


def test_any_name_of_a_run_is_words_of_its_launcher(tmp_path):
    names = [
        "lr=1e-3",
        "LR=1e-3",
        "50%j",
        "é",
        "语",
        "x" * 100,
        "x" * 100 + "y",
        "a b",
        "'",
        '"$HOME`ls`',
    ]
    commands = [Tpu(()).command(load_run(name, tmp_path), [], 0)[2] for name in names]
    assert commands[0] == "lm-lr-1e-3"
    assert len(set(commands)) == len(names)
    assert all(re.fullmatch(r"lm-[a-z0-9]([a-z0-9-]{,58}[a-z0-9])?", word) for word in commands)
    words = Slurm().command(load_run("50%j", tmp_path), [], 0)
    assert f"--output={tmp_path}/logs/50%%j.log" in words


def test_damaged_files_of_a_sweep_are_a_line_or_built_again(sweep_file, tmp_path, capsys):
    folder = tmp_path / "s"
    assert run(sweep_file, folder) == 0
    before = (folder / "results.csv").read_bytes()
    damages = [b"", b"[3]", b"\xff", b'{"state": 3}', b"[" * 99_999]
    *again, done = sorted(folder.glob("status/*.json"))
    for status, damage in zip(again, damages, strict=True):
        status.write_bytes(damage)
    metrics = folder / "runs" / done.stem / "metrics.jsonl"
    wrong = b'{"step": 1, "loss": "x"}\n3\n\xff\n{"loss": 1}\n'
    metrics.write_bytes(wrong + metrics.read_bytes() + wrong)
    assert run(sweep_file, folder) == 0
    assert (folder / "results.csv").read_bytes() == before
    for damage in [*damages[:3], b'{"runs": 3}']:
        (folder / "sweep.json").write_bytes(damage)
        with pytest.raises(UserError, match=r"sweep\.json: damaged"):
            run(sweep_file, folder)


@pytest.mark.parametrize("options", ["'", '"a', "a\\"])
def test_launcher_options_with_an_open_quote_are_one_line_errors(
    sweep_file, tmp_path, capsys, options
):
    words = ["sweep", "--config", str(sweep_file), "--workdir", f"{tmp_path}/s", "--dry_run"]
    assert main([*words, "--launcher", "slurm", "--launcher_options", options]) == 2
    assert "invalid shell syntax" in capsys.readouterr().err


def test_another_sweep_in_the_same_folder_is_rejected(sweep_file, tmp_path, monkeypatch):
    from lm.tools.launching import run_sweep as command

    monkeypatch.setattr(command, "LOCK_SECONDS", 0.0)
    run(sweep_file, tmp_path / "s", parallel=6)
    with pytest.raises(UserError, match="was started with other overrides"):
        run(sweep_file, tmp_path / "s", **{"train.steps": "30"})
    with locked(tmp_path / "s"), pytest.raises(UserError, match="another `lm sweep`"):
        run(sweep_file, tmp_path / "s")


def test_dry_run_prints_every_run_and_its_command(sweep_file, tmp_path, capsys):
    words = ["sweep", "--config", str(sweep_file), "--workdir", f"{tmp_path}/s", "--dry_run"]
    assert main([*words, "--config.train.steps=7", "--", "--cpu_devices", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(RATES)
    assert "learning_rate=0.1: " in lines[0]
    assert lines[0].endswith("--cpu_devices 2")
    for part in ("-m lm train", EXPERIMENT, "train.steps=7", "optimizer.learning_rate=0.1"):
        assert part in lines[0]
    assert main([*words, "--launcher", "slurm", "--launcher_options=--partition=gpu"]) == 0
    assert "sbatch --parsable --job-name=learning_rate=0.1" in capsys.readouterr().out
    assert main([*words, "--launcher", "tpu", "--launcher_options", "--zone us-east5-a"]) == 0
    assert "--name lm-learning-rate-0-1 --zone us-east5-a -- train" in capsys.readouterr().out
    assert not (tmp_path / "s").exists()


def test_cores_and_gpus_are_shared_out(monkeypatch):
    assert [core_share(range(8), i, 4) for i in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [core_share([0, 1], i, 3) for i in range(3)] == [[0], [1], [0]]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_share(3, 4, 8) == {"CUDA_VISIBLE_DEVICES": "6,7"}


SCONTROL = """#!/bin/sh
[ "$*" = "show job --oneliner 17" ] || exit 9
cat {answer}
"""


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("JobId=17 JobState=RUNNING Requeue=1 ExitCode=0:0", None),
        ("JobId=17 JobState=PENDING Restarts=1 ExitCode=0:0", None),
        ("JobId=17 JobState=COMPLETED ExitCode=0:0", 0),
        ("JobId=17 JobState=FAILED ExitCode=2:0", 2),
        ("JobId=17 JobState=FAILED ExitCode=0:9", -9),
        ("JobId=17 JobState=TIMEOUT ExitCode=0:15", 1),
    ],
)
def test_slurm_job_is_asked_for_its_state(tmp_path, monkeypatch, answer, code):
    (tmp_path / "answer").write_text(answer)
    (tmp_path / "scontrol").write_text(SCONTROL.format(answer=tmp_path / "answer"))
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert SlurmJob("17").poll() == code


def test_sweep_finds_its_slurm_jobs_again(sweep_file, tmp_path, monkeypatch):
    """Jobs that a sweep submitted before it was killed are watched, not submitted again."""
    submitted = tmp_path / "submitted"
    for name, body in {
        "sbatch": f'echo "$@" >> {submitted}; wc -l < {submitted}',
        "scontrol": f"[ -e {tmp_path}/over ] && echo JobState=COMPLETED || echo JobState=RUNNING",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    folder = tmp_path / "s"
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\nfrom test_sweep import run_slurm\n"
        f"sys.exit(run_slurm({str(sweep_file)!r}, Path({str(folder)!r})))"
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    until = time.monotonic() + 30
    while len(list(folder.glob("status/*.json"))) < len(RATES) and time.monotonic() < until:
        time.sleep(0.02)
    process.kill()
    process.wait()
    (tmp_path / "over").touch()
    assert run_slurm(sweep_file, folder) == 0
    lines = submitted.read_text().splitlines()
    assert len(lines) == len(RATES)
    assert "train.sbatch train --config=" in lines[0]


def run_slurm(file: str | Path, folder: Path) -> int:
    sweep, runs = load_sweep(str(file), folder, {})
    with locked(folder):
        return run_sweep(sweep, runs, folder, Slurm(), len(runs), 0, poll_seconds=0.05)


def test_runs_of_a_grid_have_the_names_that_gcloud_allows(tmp_path):
    sweep = Sweep(EXPERIMENT, named(grid({"optimizer.learning_rate": [1e-5, 3e-5]})))
    assert launchers.REPOSITORY.joinpath("experiments").is_dir()
    for name in sweep.runs:
        run = load_run(name, tmp_path)
        word = Tpu(()).command(run, [], 0)[2]
        assert word.replace("-", "a").isalnum()
        assert word == word.lower()


def load_run(name: str, folder: Path):
    from lm.sweeps.sweep import SweepRun

    return SweepRun(name, EXPERIMENT, {}, 10, folder, ())
