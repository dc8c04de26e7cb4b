"""The parts of the loop: steps per call, clock, output, when to halt or save."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import threading
import time

import pytest
from commands import arguments, losses
from hypothesis import given
from hypothesis import strategies as st

from lm.cli import main
from lm.config import default
from lm.training.monitor import Clock, MetricsFile
from lm.training.stop_signals import stop_requests
from lm.training.trainer import Loop, dispatches, train

periods = st.integers(0, 12)


@given(st.integers(1, 40), st.integers(1, 8), periods, periods, st.data())
def test_dispatches_stop_where_something_is_due_and_resume_on_the_same_grid(
    steps, together, eval_every, save_every, data
):
    config = default()
    config.train.steps, config.train.steps_per_dispatch = steps, together
    config.eval.every_steps, config.checkpoint.every_steps = eval_every, save_every
    calls = list(dispatches(0, config))
    assert [step for call in calls for step in call] == list(range(steps))
    assert all(len(call) <= together for call in calls)
    ends = {call.stop for call in calls}
    for period in (eval_every, save_every):
        assert ends >= set(range(period, steps + 1, period or steps + 1)) - {0}
    resumed_after = data.draw(st.sampled_from([0, *(call.stop for call in calls)]))
    assert list(dispatches(resumed_after, config)) == [c for c in calls if c.start >= resumed_after]


def test_metrics_of_steps_after_the_checkpoint_and_half_lines_are_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    first = MetricsFile(file, 0)
    for step in (1, 2, 3):
        first.write(step, {"loss": step / 3})
    first.close()
    with file.open("a") as stream:
        stream.write('{"step": 4, "lo')
    second = MetricsFile(file, 2)
    second.write(3, {"loss": float("nan")})
    second.close()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows == [
        {"step": 1, "loss": 1 / 3},
        {"step": 2, "loss": 2 / 3},
        {"step": 3, "loss": None},
    ]


def test_clock_adds_up_over_restarts(tmp_path):
    clock = Clock(tmp_path / "clock.json", 0)
    with clock.part("step"):
        time.sleep(0.05)
    clock.save(10)
    again = Clock(tmp_path / "clock.json", 5)  # steps 6 to 10 were lost
    with clock.part("data"):
        pass
    with again.part("step"):
        time.sleep(0.05)
    summary = again.summary(15)
    assert summary["starts"] == 2
    assert summary["steps_computed"] == 20
    assert summary["seconds"]["step"] >= 0.1
    # 15 of the 20 computed steps count.
    share = summary["seconds"]["step"] / sum(summary["seconds"].values())
    assert summary["goodput"] == pytest.approx(share * 15 / 20)


def test_signal_requests_a_stop_and_old_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    with stop_requests() as stop:
        assert not stop
        signal.raise_signal(signal.SIGTERM)
        assert stop
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)  # the second request does not wait
    assert signal.getsignal(signal.SIGTERM) is before


EXPLODE = {
    "optimizer__name": "sgd",
    "optimizer__learning_rate": 1e6,
    "optimizer__clip_norm": 0,
    "schedule__name": "constant",
    "train__steps": 8,
    "model__dropout": 0,
    "model__attention_dropout": 0,
}


def test_nonfinite_loss_halts_with_a_saved_state_and_can_resume(
    experiment_file, tmp_path, capsys, one_device
):
    words = arguments(experiment_file, tmp_path / "run", **EXPLODE)
    assert main(words) == 2
    line = next(x for x in capsys.readouterr().err.splitlines() if x.startswith("error: "))
    assert "is not finite at step" in line
    saved = max(int(f.name) for f in (tmp_path / "run" / "checkpoints").iterdir())
    assert f"saved at step {saved}" in line
    assert main([*words, "--config.train.nonfinite=skip"]) == 0
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sorted(losses(tmp_path / "run")) == list(range(1, 9))
    assert any(row.get("skipped") for row in rows)


def test_checkpoints_by_wall_time_and_a_last_evaluation_of_one_batch(
    experiment_file, tmp_path, one_device
):
    words = arguments(
        experiment_file,
        tmp_path / "run",
        checkpoint__every_steps=0,
        checkpoint__every_seconds=1e-3,
        checkpoint__keep_last=100,
        train__steps=8,
        eval__every_steps=0,
        eval__final_batches=1,
    )
    assert main(words) == 0
    saved = sorted(int(f.name) for f in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved[0] < 8
    assert saved[-1] == 8
    last = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["eval/validation/targets"] <= 8 * 16


damaged = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"", b"[]", b"{}", b"null", b"7", b"\0" * 30, b"[" * 10**5, b"9" * 5000]),
)


@given(damaged, st.integers(0, 90), st.integers(0, 90))
def test_any_damage_to_clock_and_metrics_is_a_line_and_the_run_continues(
    tmp_path_factory, content, start, length
):
    folder = tmp_path_factory.mktemp("damage")
    rows = "".join(f'{{"step": {i}, "loss": 1.0}}\n' for i in range(1, 9)).encode()
    (folder / "metrics.jsonl").write_bytes(rows[:start] + content + rows[start + length :])
    MetricsFile(folder / "metrics.jsonl", 8).close()
    steps = [json.loads(x)["step"] for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    (folder / "clock.json").write_bytes(content)
    assert Clock(folder / "clock.json", 8).summary(8)["starts"] == 1


def test_lost_middle_of_the_metrics_is_named_and_the_file_kept(tmp_path, capsys):
    file = tmp_path / "metrics.jsonl"
    rows = [f'{{"step": {i}, "loss": 1.0}}\n' for i in range(1, 9)]
    file.write_text("".join([*rows[:2], "\0\0\0\n", *rows[5:]]))
    MetricsFile(file, 8, {0: 1}).close()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "line 3; no metrics of steps 3 to 5" in said
    assert file.read_text() == "".join([*rows[:2], *rows[5:]])
    assert "\0" in (tmp_path / "metrics.jsonl.damaged").read_text()


starts = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 9)), max_size=5)


@given(starts, st.sets(st.integers(1, 45), max_size=3))
def test_only_logged_metrics_count_as_missing(tmp_path_factory, starts, lost):
    folder = tmp_path_factory.mktemp("metrics")
    step, logged = 0, []
    for period, n in starts:
        clock = Clock(folder / "clock.json", step, period)
        logged += [i for i in range(step + 1, step + n + 1) if period and i % period == 0]
        step += n
        clock.save(step)
    rows = (f'{{"step": {i}, "loss": 1.0}}\n' for i in logged if i not in lost)
    (folder / "metrics.jsonl").write_text("".join(rows))
    periods = Clock(folder / "clock.json", step, 1).log_periods
    with contextlib.redirect_stderr(io.StringIO()) as said:
        MetricsFile(folder / "metrics.jsonl", step, periods).close()
    assert ("no metrics of steps" in said.getvalue()) == any(i in lost for i in logged)


def test_line_with_a_smaller_step_is_damage(tmp_path, capsys):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in (1, 2, 3, 2, 4)))
    MetricsFile(file, 4).close()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3, 4]
    assert "(line 4)" in capsys.readouterr().err


def test_step_that_fails_ends_the_thread_that_prepares_batches(
    tiny_config, one_device, tmp_path, monkeypatch
):
    """A process waits for that thread, and its traceback keeps the loop."""

    def fail(*args):
        raise RuntimeError("no memory")

    monkeypatch.setattr(Loop, "_program", fail)
    with pytest.raises(RuntimeError, match="no memory") as error:
        train(tiny_config(train__steps=50), tmp_path / "run")
    assert error.tb is not None
    assert not [t for t in threading.enumerate() if t.name.startswith("lm-batches")]
