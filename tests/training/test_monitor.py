"""A hanging run ends with a line within the stated time; a working one does not."""

from __future__ import annotations

import json
import os
import re
import time

from commands import arguments

import lm.progress
from lm import load_config, train
from lm.cli import main
from lm.runs.incidents import report_stall
from lm.training.monitor import watchdog


def test_stall_ends_the_process_and_reports_its_start(tmp_path, capsys):
    ends: list[int] = []
    with watchdog(0.2, tmp_path, ends.append) as beat:
        beat("step 12")
        time.sleep(1.0)
    assert ends == [1]
    assert "no progress for 0.2 s since step 12" in capsys.readouterr().err
    incident = json.loads((tmp_path / "incidents.jsonl").read_text())
    assert "since step 12" in incident["incident"]
    assert incident["process"].endswith(f", {os.getpid()}")
    assert "thread MainThread:" in incident["stacks"]
    assert "time.sleep(1.0)" in incident["stacks"]


def test_stacks_of_a_stall_are_printed_where_they_cannot_be_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lm.runs.incidents.SECONDS_TO_WRITE", 0.1)
    report_stall(tmp_path / "is not there", "nothing happened")
    stacks, error = capsys.readouterr().err.rsplit("error: ", 1)
    assert "thread MainThread:" in stacks
    assert error.startswith("nothing happened: a peer")


def test_heartbeats_prevent_a_stall_and_zero_disables_the_watchdog(tmp_path, capsys):
    ends: list[int] = []
    with watchdog(0.4, tmp_path, ends.append) as beat:
        for step in range(10):
            beat(f"step {step}")
            time.sleep(0.08)
    with watchdog(0.0, tmp_path, ends.append) as beat:
        beat("step 1")
    assert ends == []
    assert capsys.readouterr().err == ""


def test_training_tokenizing_and_evaluation_show_lines_and_the_library_is_silent(
    experiment_file, tmp_path, one_device, monkeypatch, capfd
):
    monkeypatch.setattr(lm.progress, "_SECONDS_A_LINE", 0)
    few = {"train__steps": 4, "eval__every_steps": 2, "eval__batch_size": 4}
    few["data__cache_directory"] = tmp_path / "cache"
    assert main(arguments(experiment_file, tmp_path / "run", **few)) == 0
    err = capfd.readouterr().err
    assert not set("\r\x1b") & set(err)
    shown = r"(?m)^(\w+).*?: \S+ of \S+ \(\d+ %\), .* left"
    assert set(re.findall(shown, err)) == {"tokenizing", "evaluating", "training"}
    assert re.search(r"training: 4 of 4 .* left, loss=\d\.\d{4}, tok_s=\S+", err)

    values = {"train.steps": 4, "eval.every_steps": 2, "eval.batch_size": 4}
    values["data.cache_directory"] = str(tmp_path / "other cache")
    train(load_config(str(experiment_file), values), tmp_path / "silent")
    assert capfd.readouterr() == ("", "")
