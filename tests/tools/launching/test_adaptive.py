"""Adaptive search with a stand-in for training: proposals depend on seed and results only."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_sweep import EXPERIMENT, FAKE, starts, table

from lm.cli import main
from lm.errors import UserError
from lm.sweeps.sweep import load_sweep
from lm.tools.launching.launchers import Local
from lm.tools.launching.run_sweep import Trials, locked, run_search

SEARCH = """
from lm.sweeps.sweep import Search

def suggest(trial):
    rate = trial.suggest_float("rate", 1e-3, 10.0, log=True)
    return {{"optimizer.learning_rate": rate, "seed": 13 if trial.number == 2 else 0}}

def get_sweep(n="16"):
    return Search("{experiment}", suggest, trials=int(n), metric="loss", seed=3)
"""


@pytest.fixture
def search_file(tmp_path) -> Path:
    pytest.importorskip("optuna")
    file = tmp_path / "search.py"
    file.write_text(SEARCH.format(experiment=EXPERIMENT))
    return file


def run(file: str | Path, folder: Path) -> int:
    search, runs = load_sweep(str(file), folder, {"train.steps": "10"})
    assert runs == []
    with locked(folder) as lock:
        trials = Trials(search, folder, {"train.steps": "10"}, ())
        launcher = Local(4, lm=FAKE, keep_open=(lock,))
        return run_search(trials, launcher, parallel=4, retries=0, poll_seconds=0.02)


PROGRAM = """
import sys; sys.path.insert(0, {tests!r})
from pathlib import Path
from test_adaptive import run
sys.exit(run({file!r}, Path({folder!r})))
"""


def test_search_finds_low_losses_and_survives_sigkill(search_file, tmp_path):
    calm, shaken = tmp_path / "calm", tmp_path / "shaken"
    assert run(search_file, calm) == 1  # the run of seed 13 fails
    rows = table(calm)
    rates = [float(row["optimizer.learning_rate"]) for row in rows.values()]
    assert len(rows) == 16
    assert [name for name, row in rows.items() if row["state"] == "failed"] == ["trial-002"]
    # The loss falls with the rate: after twelve random trials the search asks for high ones.
    assert min(rates[12:]) > sorted(rates[:12])[6]

    tests = str(Path(__file__).parent)
    program = PROGRAM.format(tests=tests, file=str(search_file), folder=str(shaken))
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
        time.sleep(1.5)
        process.kill()
        process.wait()
    assert run(search_file, shaken) == 1
    assert (shaken / "results.csv").read_bytes() == (calm / "results.csv").read_bytes()

    done = [name for name, row in rows.items() if row["state"] == "done"]
    before = {name: starts(calm, name) for name in done}
    assert run(f"{search_file}:18", calm) == 1  # two more trials; the others are left alone
    assert len(table(calm)) == 18
    assert {name: starts(calm, name) for name in done} == before


@pytest.mark.parametrize("method", ["tell", "_try_run", "_sampler"])
def test_search_killed_within_a_batch_proposes_the_same(method, search_file, tmp_path, monkeypatch):
    assert run(search_file, tmp_path / "calm") == 1
    usual, calls = getattr(Trials, method), []

    def dies(*args):
        calls.append(args)
        if len(calls) in (3, 14, 30):
            raise KeyboardInterrupt
        return usual(*args)

    monkeypatch.setattr(Trials, method, dies)
    while True:
        try:
            run(search_file, tmp_path / "shaken")
            break
        except KeyboardInterrupt:
            pass
    found = [(tmp_path / name / "results.csv").read_text() for name in ("calm", "shaken")]
    assert found[0] == found[1]
    assert len(calls) > 14


def test_trials_that_are_no_run_fail_and_the_search_continues(search_file, tmp_path):
    bad = """
    if trial.number in (0, 1, 2, 3):
        return {"model.n_heads": 7}
    if trial.number == 5:
        return {"no.key": 1}
    if trial.number == 6:
        raise ValueError("no such thing")
    if trial.number == 7:
        return 3
"""
    text = search_file.read_text()
    search_file.write_text(text.replace("def suggest(trial):\n", f"def suggest(trial):{bad}"))
    for _ in range(2):  # and again: nothing is left to do
        assert run(f"{search_file}:9", tmp_path / "s") == 1
        states = {name: row["state"] for name, row in table(tmp_path / "s").items()}
        assert list(states) == [f"trial-{number:03}" for number in range(9)]
        done = [name for name, state in states.items() if state == "done"]
        assert done == ["trial-004", "trial-008"]
    reason = json.loads((tmp_path / "s" / "status" / "trial-006.json").read_text())["reason"]
    assert reason == "ValueError: no such thing"


def test_dry_run_prints_the_first_runs_and_stores_nothing(search_file, tmp_path, capsys):
    words = ["sweep", "--config", str(search_file), "--workdir", f"{tmp_path}/s", "--dry_run"]
    assert main([*words, "--parallel", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["trial-000", "trial-001"]
    assert "--config.optimizer.learning_rate=" in lines[0]
    assert not (tmp_path / "s").exists()


def test_without_optuna_one_line_names_the_extra(tmp_path, monkeypatch):
    file = tmp_path / "search.py"
    file.write_text(SEARCH.format(experiment=EXPERIMENT))
    monkeypatch.setitem(sys.modules, "optuna", None)
    search, _ = load_sweep(str(file), tmp_path / "s", {})
    with pytest.raises(UserError, match=r"pip install .*\[sweep\]'"):
        Trials(search, tmp_path / "s", {}, ())


def test_damaged_study_is_a_one_line_error_that_says_what_to_do(search_file, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "study.db").write_bytes(b"no database" * 99)
    with pytest.raises(
        UserError, match=r"study\.db: not a study of this search .*: remove the file"
    ):
        run(search_file, tmp_path / "s")


def test_trial_that_exits_is_a_failed_one(search_file, tmp_path):
    search_file.write_text(search_file.read_text().replace("return {", "exit()\n    return {"))
    assert run(f"{search_file}:2", tmp_path / "s") == 1
    assert {row["state"] for row in table(tmp_path / "s").values()} == {"failed"}
