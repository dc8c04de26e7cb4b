"""Signals ask a run to stop: it saves, or ends at once if there is nothing to save."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from commands import (
    arguments,
    evaluations,
    finish,
    losses,
    start,
    together,
    wait_for_step,
)

import lm.training.results
from lm.cli import main
from lm.training import stop_signals
from lm.training.stop_signals import stop_requests


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1"])
def test_other_signals_save_too_unless_ignored_at_the_start(experiment_file, tmp_path, name):
    number = signal.Signals[name]
    words = arguments(experiment_file, tmp_path / "run", checkpoint__every_steps=0)
    before = signal.signal(number, signal.SIG_DFL)  # these tests may themselves run by nohup
    try:
        process = start(words)
        wait_for_step(tmp_path / "run", 9, process)
        process.send_signal(number)
        finish(process, code=75)
        (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
        assert int(saved.name) == max(losses(tmp_path / "run")) < 60
        signal.signal(number, signal.SIG_IGN)  # as nohup does; processes inherit it
        process = start(words)
        wait_for_step(tmp_path / "run", int(saved.name) + 2, process)
        process.send_signal(number)
        finish(process)
    finally:
        signal.signal(number, before)


@pytest.fixture
def slow_file(experiment_file, tmp_path):
    """An experiment file that takes a minute, as tokenizing and compiling may."""
    file = tmp_path / "slow.py"
    pause = f"    import time\n    open({str(tmp_path / 'waits')!r}, 'a').write('x')\n"
    pause += "    time.sleep(60)\n"
    text = experiment_file.read_text()
    file.write_text(text.replace("def get_config():\n", f"def get_config():\n{pause}"))
    return file


def wait_for_bytes(file: Path, n: int) -> None:
    until = time.monotonic() + 100
    while not file.exists() or file.stat().st_size < n:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_stop_before_the_first_step_exits_at_once(slow_file, tmp_path):
    process = start(arguments(slow_file, tmp_path / "run"))
    wait_for_bytes(tmp_path / "waits", 1)
    began = time.monotonic()
    process.terminate()
    (output,) = finish(process, code=75)
    assert time.monotonic() - began < 5
    assert "asked to stop, with nothing to save" in output
    assert not (tmp_path / "run").exists()


def test_before_the_first_step_one_signal_ends_all_processes(slow_file, tmp_path):
    words = arguments(slow_file, tmp_path / "run")
    processes = together(words, words)
    wait_for_bytes(tmp_path / "waits", 2)
    began = time.monotonic()
    processes[0].terminate()
    finish(*processes, code=75)
    assert time.monotonic() - began < 10


def test_evaluation_is_dropped_and_made_up_for(
    experiment_file, undisturbed, tmp_path, one_device, monkeypatch
):
    run, whole = tmp_path / "run", lm.training.results.evaluate_loss
    words = arguments(experiment_file, run, checkpoint__every_steps=0)

    def interrupted(*args, **options):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.5)  # for the thread that watches
        return whole(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(lm.training.results, "evaluate_loss", interrupted)
        assert main(words) == 75
    assert not evaluations(run)
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["20"]
    assert main(words) == 0
    assert losses(run) == losses(undisturbed)
    assert evaluations(run) == evaluations(undisturbed)


COMPILES_FOR_A_MINUTE = """
import sys, time
from types import SimpleNamespace
from lm.cli import main
from lm.training import results
slow = SimpleNamespace(lower=lambda *_: time.sleep(60))
whole = results._compile
results._compile = lambda function, *others: whole(slow, *others)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_that_compiles_is_dropped_too(experiment_file, tmp_path, processes):
    words = arguments(experiment_file, tmp_path / "run", checkpoint__every_steps=0)
    begin = [sys.executable, "-c", COMPILES_FOR_A_MINUTE]
    run = together(*[words] * processes, processes=processes, begin=begin)
    wait_for_step(tmp_path / "run", 20, run[0])
    time.sleep(1.0)
    began = time.monotonic()
    run[-1].terminate()
    finish(*run, code=75)
    assert time.monotonic() - began < 15
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == ["20"]
    assert not evaluations(tmp_path / "run")


@pytest.mark.parametrize("step", [40, 60])
def test_restart_repeats_an_interrupted_evaluation(
    experiment_file, undisturbed, tmp_path, one_device, step
):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    for folder in (run / "checkpoints").iterdir():
        if int(folder.name) > step:
            shutil.rmtree(folder)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["step"] <= step and (row["step"] < step or "loss" in row)]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    if step not in {int(folder.name) for folder in (run / "checkpoints").iterdir()}:
        pytest.skip("its checkpoint was not kept")
    for _ in range(2):  # the second start finds it done
        assert main(arguments(experiment_file, run)) == 0
        assert evaluations(run) == evaluations(undisturbed)


def test_second_signal_ends_at_once_but_not_what_a_launcher_passes_on(monkeypatch):
    codes = []
    monkeypatch.setattr(stop_signals, "_end", lambda code, line: codes.append(code))
    monkeypatch.setattr(stop_signals, "_ONE_REQUEST_SECONDS", 0.3)
    with stop_requests(exits=True) as stop:
        stop.nothing_to_save = lambda: False
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.1)
        assert stop
        assert codes == []
        time.sleep(0.3)
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.1)
        assert codes == [130]
    with stop_requests(exits=True) as stop:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.1)
        assert codes == [130, 75]
