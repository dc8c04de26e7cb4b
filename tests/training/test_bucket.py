"""Run in a bucket, with a local emulator of Google's storage."""

from __future__ import annotations

import importlib.util
import json
import re
import socket
import subprocess
import time

import pytest
from commands import arguments, evaluations, finish, losses, start
from emulated_bucket import emulated_bucket

import lm.storage.bucket
from lm.cli import main
from lm.errors import UserError
from lm.storage import local_copies, open_run_folder, resolve_path, storage_path, upload_changes
from lm.storage.bucket import lease
from lm.tools.launching.supervise import newest_checkpoint


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def bucket():
    """The address of a bucket, for this process and those that it starts."""
    with emulated_bucket("runs", free_port()) as address:
        yield address


@pytest.fixture(scope="module")
def killed(bucket, experiment_file) -> str:
    """The address of a run that was killed after its first checkpoint, and then continued."""
    place = f"{bucket}/killed/run"
    words = arguments(experiment_file, place, eval__best="-loss")
    process = start(words)
    while process.poll() is None and not checkpoints(place):
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert max(checkpoints(place)) < 60
    (output,) = finish(start(words))
    assert "continuing from step" in output
    assert f"run is in {place}" in output
    return place


def checkpoints(place: str) -> list[int]:
    """The steps of the whole checkpoints."""
    files = resolve_path(place).glob("checkpoints/*/commit_success.txt")
    return sorted(int(file.parent.name) for file in files if file.parent.name.isdigit())


def test_killed_run_resumes_bitwise_from_the_bucket(killed, undisturbed):
    assert losses(resolve_path(killed)) == losses(undisturbed)
    assert evaluations(resolve_path(killed)) == evaluations(undisturbed)
    names = {path.name for path in resolve_path(killed).iterdir()}
    assert {"run.json", "clock.json", "tokenizer", "checkpoints", "best"} <= names


def test_verbs_read_from_the_bucket_and_write_there(killed, undisturbed, one_device, capsys):
    for words in (["eval", "--average=2"], ["generate", "--prompt=1 + ", "--greedy"]):
        printed = []
        for place in (killed, str(undisturbed)):
            assert main([*words, f"--workdir={place}"]) == 0
            printed.append(capsys.readouterr().out)
        assert printed[0] == printed[1]
    assert main(["report", f"--workdir={killed}"]) == 0
    assert f"{killed}/report/index.html" in capsys.readouterr().out
    assert resolve_path(f"{killed}/report/index.html").exists()
    assert main(["merge", f"--workdir={killed}", f"--to={killed}-mean", "--average=2"]) == 0
    assert main(["eval", f"--workdir={killed}-mean"]) == 0
    assert main(["eval", "--best", f"--workdir={killed}"]) == 0


def test_run_starts_from_one_in_the_bucket(killed, experiment_file, tmp_path, one_device, capsys):
    changes = {"init__from": killed, "data__tokenizer": f"run:{killed}", "train__steps": 2}
    assert main(arguments(experiment_file, tmp_path / "run", **changes)) == 0
    first = losses(tmp_path / "run")[1]
    assert first < losses(resolve_path(killed))[1] - 0.5
    words = ["train", f"--config={killed}/run.json", f"--workdir={killed}-again"]
    assert main([*words, "--config.train.steps=2"]) == 0
    assert losses(resolve_path(f"{killed}-again"))[1] == losses(resolve_path(killed))[1]


def test_damaged_checkpoint_is_set_aside_in_the_bucket(bucket, experiment_file, one_device, capsys):
    place = f"{bucket}/damaged/run"
    assert main(arguments(experiment_file, place, train__stop_at=14)) == 75
    (parts,) = resolve_path(f"{place}/checkpoints/14/state").glob("ocdbt.process_0/d")
    largest = max(parts.iterdir(), key=lambda file: file.stat().length)
    largest.write_bytes(largest.read_bytes()[:100])
    assert main(arguments(experiment_file, place, train__stop_at=16)) == 75
    said = capsys.readouterr().err
    assert "checkpoint 14 is damaged" in said
    assert "continuing from step 12" in said
    assert resolve_path(f"{place}/damaged/14").is_dir()
    assert checkpoints(place)[-2:] == [12, 16]
    resolve_path(f"{place}/checkpoints/16/commit_success.txt").unlink()  # as of a save that was cut
    assert newest_checkpoint(resolve_path(place)) == 12
    assert main(["eval", f"--workdir={place}", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["step"] == 12
    assert "damaged" not in captured.err


def test_two_processes_write_one_checkpoint(bucket, experiment_file, undisturbed):
    place = f"{bucket}/two/run"
    words = arguments(experiment_file, place, train__stop_at=12)
    launch = ["launch", "--processes", "2", "--", *words, "--cpu_devices", "2"]
    finish(start(launch), code=75)
    assert checkpoints(place) == [6, 12]
    expected, found = losses(undisturbed), losses(resolve_path(place))
    assert found == pytest.approx({step: expected[step] for step in range(1, 13)}, rel=1e-5)


def test_one_process_at_a_time_has_the_lease(bucket, monkeypatch, capsys):
    monkeypatch.setattr(lm.storage.bucket, "_RENEW_SECONDS", 0.2)
    place = resolve_path(f"{bucket}/leased/run")
    with lease(place, "taken"):
        assert "machine" in json.loads((place / ".lock").read_text())
        with pytest.raises(UserError, match="taken"), lease(place, "taken"):
            pass
        assert "watching it" in capsys.readouterr().err
    assert not (place / ".lock").exists()


def test_lease_of_a_process_that_ended_is_taken_over(bucket, monkeypatch, capsys):
    place = resolve_path(f"{bucket}/left/run")
    ended = subprocess.Popen(["true"])
    ended.wait()
    left = {"machine": lm.storage.bucket.machine_name(), "process": ended.pid}
    (place / ".lock").write_text(json.dumps(left))
    with lease(place, "taken"):
        pass
    assert not capsys.readouterr().err
    monkeypatch.setattr(lm.storage.bucket, "_RENEW_SECONDS", 0.2)
    for text in ('{"machine": "another", "process": 1}', "damaged"):
        (place / ".lock").write_text(text)
        with lease(place, "taken"):
            assert "watching it" in capsys.readouterr().err


def test_process_whose_lease_was_taken_over_ends(bucket, monkeypatch, capsys):
    monkeypatch.setattr(lm.storage.bucket, "_RENEW_SECONDS", 0.1)
    place, codes = resolve_path(f"{bucket}/lost/run"), []
    with lease(place, "taken", codes.append):
        (place / ".lock").write_text('{"owner": "another"}')
        until = time.monotonic() + 10
        while not codes and time.monotonic() < until:
            time.sleep(0.05)
    assert codes == [1]
    assert f"another process now trains in {place}" in capsys.readouterr().err
    assert (place / ".lock").read_text() == '{"owner": "another"}'


def test_changed_options_are_sent_once(bucket):
    folder = open_run_folder(f"{bucket}/copy")
    assert open_run_folder(f"{bucket}/copy/") == folder
    (folder / "a").write_text("1")
    (folder / "eval").mkdir()
    (folder / "eval" / "b").write_text("2")
    upload_changes()
    assert resolve_path(f"{bucket}/copy/eval/b").read_text() == "2"
    assert storage_path(folder / "eval") == resolve_path(f"{bucket}/copy/eval")
    resolve_path(f"{bucket}/copy/a").write_text("of another process")
    (folder / "eval" / "b").write_text("two")
    upload_changes()
    assert resolve_path(f"{bucket}/copy/a").read_text() == "of another process"
    assert resolve_path(f"{bucket}/copy/eval/b").read_text() == "two"
    with local_copies():
        (folder / "c").write_text("3")
    assert not folder.exists()
    assert resolve_path(f"{bucket}/copy/c").read_text() == "3"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("s3://runs/x", "expected a local folder or gs://BUCKET/PATH"),
        ("gs://no-such-bucket/x", "gs://no-such-bucket/x: FileNotFoundError"),
    ],
)
def test_wrong_address_is_a_one_line_error(
    bucket, experiment_file, one_device, capsys, place, message
):
    assert main(arguments(experiment_file, place)) == 2
    assert message in capsys.readouterr().err


def test_missing_gcsfs_names_the_install_command(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gcsfs" else find(name)
    )
    assert main(["eval", "--workdir=gs://elsewhere/run"]) == 2
    assert re.search(r"pip install .*\[gcs\]'", capsys.readouterr().err)


def test_sweep_needs_a_folder(capsys):
    sweep = "experiments/sweeps/learning_rate_width.py"
    assert main(["sweep", f"--config={sweep}", "--workdir=gs://runs/sweep"]) == 2
    assert "a local or mounted folder" in capsys.readouterr().err


def test_forks_out_of_and_into_a_bucket(killed, undisturbed, experiment_file, bucket, tmp_path):
    step = checkpoints(killed)[0]
    for place in (f"{bucket}/fork", str(tmp_path / "fork")):
        words = arguments(experiment_file, place, train__stop_at=step + 4)
        for _ in range(2):  # the second start continues the fork, and has nothing to do
            finish(start([*words, "--fork", f"{killed}@{step}"]), code=75)
        found = losses(resolve_path(place))
        assert found == {at: x for at, x in losses(undisturbed).items() if at <= step + 4}
