"""An interrupted and resumed run equals an uninterrupted one."""

from __future__ import annotations

import random
import signal
import socket

import numpy as np
from commands import arguments, evaluations, finish, losses, start, together, wait_for_step

from lm.cli import main


def test_sigkill_anywhere_resumes_bitwise(experiment_file, undisturbed, tmp_path):
    chance = random.Random(0)
    words = arguments(experiment_file, tmp_path / "run")
    last_kill = 0
    for _ in range(4):
        process = start(words)
        last_kill = min(last_kill + chance.randrange(4, 18), 58)
        wait_for_step(tmp_path / "run", last_kill, process)
        process.kill()
        process.wait()
    finish(start(words))
    assert losses(tmp_path / "run") == losses(undisturbed)
    assert list(losses(tmp_path / "run")) == list(range(1, 61))
    assert evaluations(tmp_path / "run") == evaluations(undisturbed)


def test_sigterm_saves_and_exits_75(experiment_file, undisturbed, tmp_path):
    words = arguments(experiment_file, tmp_path / "run", checkpoint__every_steps=0)
    process = start(words)
    wait_for_step(tmp_path / "run", 9, process)
    process.send_signal(signal.SIGTERM)
    (output,) = finish(process, code=75)
    assert "the same command continues" in output
    saved = max(int(folder.name) for folder in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == max(losses(tmp_path / "run"))
    finish(start(words))
    assert losses(tmp_path / "run") == losses(undisturbed)


def test_stop_at_saves_there_and_changes_no_loss(experiment_file, undisturbed, tmp_path):
    run = tmp_path / "run"
    words = arguments(experiment_file, run, train__stop_at=21, checkpoint__every_steps=0)
    for _ in range(2):  # a second start has nothing to do
        finish(start(words), code=75)
        assert max(losses(run)) == 22  # two steps a dispatch
        assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["22"]
    finish(start(arguments(experiment_file, run, checkpoint__every_steps=0)))
    assert losses(run) == losses(undisturbed)


def test_resume_on_another_mesh_and_on_two_processes(experiment_file, undisturbed, tmp_path):
    run = tmp_path / "run"
    words = arguments(experiment_file, run)
    process = start(words)
    wait_for_step(run, 20, process)
    process.send_signal(signal.SIGTERM)
    finish(process, code=75)
    first_part = max(losses(run))

    mesh = [
        "--cpu_devices",
        "8",
        "--config.parallel.mesh.stage=2",
        "--config.parallel.mesh.context=2",
        "--config.parallel.mesh.tensor=2",
    ]
    process = start([*words, *mesh])
    wait_for_step(run, 40, process)
    process.send_signal(signal.SIGTERM)
    finish(process, code=75)
    second_part = max(losses(run))
    assert second_part > first_part

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = ["--cpu_devices", "4", "--coordinator", f"127.0.0.1:{port}", "--num_processes", "2"]
    finish(*(start([*words, *together, "--process_id", str(i)]) for i in range(2)))

    expected, found = losses(undisturbed), losses(run)
    assert list(found) == list(expected)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)


def test_finished_run_is_left_alone(experiment_file, undisturbed):
    before = (undisturbed / "metrics.jsonl").read_text()
    finish(start(arguments(experiment_file, undisturbed)))
    assert (undisturbed / "metrics.jsonl").read_text() == before


def test_processes_that_disagree_end_with_the_difference(experiment_file, tmp_path):
    outputs = finish(
        *together(
            arguments(experiment_file, tmp_path / "run"),
            arguments(experiment_file, tmp_path / "run", seed=7, data__workers=1),
        ),
        code=2,
    )
    for output in outputs:
        assert "error: process 1 differs from process 0 in --config.seed (7, there 0)" in output
        assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


def test_process_that_fails_alone_ends_the_others_with_a_line(experiment_file, tmp_path):
    processes = together(
        arguments(experiment_file, tmp_path / "run"),
        arguments(experiment_file, tmp_path / "run", seed="none"),
    )
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 2], outputs
    assert "Traceback" not in "".join(outputs)
    assert "another process of the run has ended" in outputs[0]


def test_run_without_a_readable_checkpoint_never_starts_at_0_by_itself(
    experiment_file, tmp_path, one_device, capsys
):
    run = tmp_path / "run"
    words = arguments(experiment_file, run, train__steps=8, checkpoint__keep_last=1)
    assert main([*words, "--config.train.stop_at=6"]) == 75
    before = (run / "metrics.jsonl").read_bytes()
    (run / "run.json").unlink()
    assert main([*words, "--config.seed=9"]) == 2  # the checkpoint knows whose it is
    assert "--config.seed: 0 → 9" in capsys.readouterr().err
    (checkpoint,) = (run / "checkpoints").iterdir()
    for file in checkpoint.rglob("d/*"):
        file.write_bytes(file.read_bytes()[:10])
    for _ in range(2):  # the second finds the checkpoint set aside
        assert main(words) == 2
        assert "--restart" in capsys.readouterr().err
        assert (run / "metrics.jsonl").read_bytes() == before
    assert main([*words, "--restart"]) == 0
    assert (run / "restarted.0" / "metrics.jsonl").read_bytes() == before
    assert list(losses(run)) == list(range(1, 9))
    assert main([*words, "--restart"]) == 0  # as a supervisor would: nothing is lost again
    assert not (run / "restarted.1").exists()
    assert list(losses(run)) == list(range(1, 9))


def test_start_that_failed_before_its_first_step_leaves_no_run(
    experiment_file, tmp_path, one_device
):
    run = tmp_path / "run"
    missing = f"--config.init.from={tmp_path / 'missing'}"
    assert main([*arguments(experiment_file, run, train__steps=2), missing]) == 2
    assert main(arguments(experiment_file, run, train__steps=2)) == 0
