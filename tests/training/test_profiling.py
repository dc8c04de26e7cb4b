"""A profile has the requested steps, and does not affect the run."""

from __future__ import annotations

import gzip
import json
import re
from types import SimpleNamespace

import pytest
from commands import arguments, finish, start, together

from lm import load_config
from lm.cli import main
from lm.errors import UserError
from lm.training.profiling import profile


@pytest.fixture
def tracer(monkeypatch):
    """Profiler that records its calls."""
    calls: list[str] = []
    monkeypatch.setattr("jax.profiler.start_trace", lambda *args, **kwargs: calls.append("start"))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: calls.append("stop"))
    monkeypatch.setattr("jax.profiler.save_device_memory_profile", lambda file: None)
    return calls


@pytest.mark.parametrize(
    ("steps", "traced"),
    [
        ("0:1", [(0, 2)]),
        ("3:2", [(2, 4), (4, 6)]),
        ("5:100", [(4, 6), (6, 8)]),
        ("8:1", []),
    ],
)
def test_dispatches_with_these_steps_are_traced(tracer, tmp_path, steps, traced):
    lines: list[str] = []
    planned = [range(start, start + 2) for start in range(0, 8, 2)]
    seen = []
    loop = SimpleNamespace(state=None, dispatches=planned)
    with profile(loop, steps, tmp_path, lines.append):
        for dispatch in loop.dispatches:
            if tracer == ["start"]:
                seen.append((dispatch.start, dispatch.stop))
    assert seen == traced
    if traced:
        assert tracer == ["start", "stop"]
        assert f"steps {traced[0][0]} to {traced[-1][1] - 1}" in lines[0]
    else:
        assert tracer == []
        assert "were not run" in lines[0]


def test_run_that_stops_early_ends_its_trace(tracer, tmp_path):
    loop = SimpleNamespace(state=None, dispatches=[range(1), range(1, 2)])
    with profile(loop, "0:2", tmp_path, print):
        next(loop.dispatches)
    assert tracer == ["start", "stop"]


def test_run_writes_trace_and_memory(experiment_file, tmp_path, one_device):
    run = tmp_path / "run"
    few = {"train__steps": 4, "train__profile": "1:2", "train__steps_per_dispatch": 1}
    assert main(arguments(experiment_file, run, **few)) == 0
    assert list(run.glob("profile/plugins/profile/*/*.xplane.pb"))
    assert (run / "profile/memory-0.pprof").stat().st_size
    (trace,) = run.glob("profile/plugins/profile/*/perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = {event["args"]["step_num"] for event in events if event.get("name") == "train"}
    assert steps == {"1", "2"}


def test_each_of_two_processes_has_a_trace_of_its_own(experiment_file, tmp_path):
    """JAX names files by host and second: in one folder one would overwrite the other's."""
    run = tmp_path / "run"
    few = {"train__steps": 3, "train__profile": "1:1", "train__steps_per_dispatch": 1}
    words = arguments(experiment_file, run, **few)
    finish(*together(words, words))
    for number in range(2):
        assert list(run.glob(f"profile/process-{number}/plugins/profile/*/*.xplane.pb"))
        assert (run / f"profile/memory-{number}.pprof").stat().st_size
    assert list(run.glob("profile/process-0/plugins/profile/*/perfetto_trace.json.gz"))


@pytest.mark.parametrize("spec", ["5", "5:0", ":5", "a:b", "-1:2", "1:2:3", "1.5:2"])
def test_wrong_range_is_named(experiment_file, spec):
    with pytest.raises(UserError, match=re.escape(f"train.profile={spec}: expected START:STEPS")):
        load_config(str(experiment_file), {"train.profile": spec})


def test_programs_are_written_as_texts(experiment_file, tmp_path):
    words = arguments(experiment_file, tmp_path / "run", train__steps=1)
    process = start([*words, "--dump_hlo", str(tmp_path / "hlo"), "--cpu_devices", "1"])
    assert process.wait() == 0, process.stdout.read()
    (program,) = tmp_path.glob("hlo/*train_steps*after_optimizations.txt")
    assert {"optimizer", "cross_entropy"} <= set(re.findall(r"\w+", program.read_text()))
