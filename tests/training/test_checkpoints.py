"""Checkpoints: damage is noticed and survived, a full disk gives one line, old ones are kept."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lm.config import default
from lm.errors import UserError
from lm.runs.checkpoints import Checkpoints
from lm.train_step import TrainState

ONE_DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def state_at(step: int) -> TrainState:
    params = {"w": jnp.arange(4096, dtype=jnp.float32) * step, "b": jnp.full(3, step, jnp.bfloat16)}
    return TrainState(jnp.asarray(step), params, {"count": jnp.asarray(step)}, {})


def shapes() -> tuple[TrainState, TrainState]:
    shape = jax.eval_shape(lambda: state_at(0))
    return shape, jax.tree.map(lambda _: ONE_DEVICE, shape)


def saved(folder: Path, steps: list[int], **options: int) -> Checkpoints:
    config = default().checkpoint
    config.update(options)
    checkpoints = Checkpoints(folder, config, {"config": {}})
    for step in steps:
        checkpoints.save(step, state_at(step))
    checkpoints.close()
    return Checkpoints(folder, config, {"config": {}})


def biggest_file(folder: Path) -> Path:
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def restore(checkpoints: Checkpoints) -> tuple[TrainState | None, list[str]]:
    said: list[str] = []
    return checkpoints.restore(*shapes(), said.append), said


def test_newest_state_comes_back_bitwise(tmp_path):
    state, said = restore(saved(tmp_path / "c", [1, 2]))
    assert not said
    assert state is not None
    jax.tree.map(np.testing.assert_array_equal, state, state_at(2))
    jax.tree.map(lambda a, b: a.dtype == b.dtype or pytest.fail("dtype"), state, state_at(2))


def test_no_checkpoint_gives_no_state(tmp_path):
    assert restore(saved(tmp_path / "c", [])) == (None, [])


@pytest.mark.parametrize("damage", ["cut short", "emptied", "bits changed", "file removed"])
def test_damaged_newest_checkpoint_is_reported_and_the_previous_one_used(tmp_path, damage):
    checkpoints = saved(tmp_path / "c", [1, 2])
    file = biggest_file(tmp_path / "c" / "2" / "state")
    content = bytearray(file.read_bytes())
    match damage:
        case "cut short":
            file.write_bytes(content[: len(content) // 2])
        case "emptied":
            file.write_bytes(b"")
        case "bits changed":
            for i in range(len(content) // 2, len(content) // 2 + 64):
                content[i] ^= 0xFF
            file.write_bytes(content)
        case "file removed":
            shutil.rmtree(tmp_path / "c" / "2" / "state")
    state, said = restore(checkpoints)
    assert len(said) == 1
    assert "checkpoint 2 is damaged" in said[0]
    jax.tree.map(np.testing.assert_array_equal, state, state_at(1))
    assert (tmp_path / "damaged" / "2").is_dir()  # nothing is lost
    checkpoints.save(2, state_at(2))  # and its step is free again
    checkpoints.close()


def test_wrong_checksum_is_damage(tmp_path):
    checkpoints = saved(tmp_path / "c", [1])
    file = next((tmp_path / "c" / "1").rglob("metadata/metadata"))
    metadata = json.loads(file.read_text())
    metadata["checksums"]["params/w"] ^= 1
    file.write_text(json.dumps(metadata))
    state, said = restore(checkpoints)
    assert state is None
    assert "checksums" in said[0]


def test_old_checkpoints_go_except_every_so_many(tmp_path):
    saved(tmp_path / "c", [5, 10, 12, 14], keep_last=2, keep_every_steps=10)
    kept = {int(f.name) for f in (tmp_path / "c").iterdir() if f.name.isdigit()}
    assert kept == {10, 12, 14}


def test_full_disk_is_a_one_line_error_and_older_checkpoints_stay(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path / "c", [1])

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    with pytest.raises(UserError, match="is full; older checkpoints are intact"):
        checkpoints.save(2, state_at(2))
    monkeypatch.undo()
    state, _ = restore(saved(tmp_path / "c", []))
    jax.tree.map(np.testing.assert_array_equal, state, state_at(1))


def test_too_little_space_is_noticed_before_writing(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path / "c", [1])
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 8, 1000))
    with pytest.raises(UserError, match=r"has 0.0 MB left .* older checkpoints are intact"):
        checkpoints.save(2, state_at(2))
    assert {f.name for f in (tmp_path / "c").iterdir()} == {"1"}
