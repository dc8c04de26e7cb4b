"""Whatever is trained, a run that is cut and started again equals one that never stopped."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from conftest import evaluations, losses, saved_state
from kinds import KINDS

from lm.training.train import train


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("one_device")
def test_going_on_changes_no_bit(make_kind, tmp_path, capsys, kind):
    config = make_kind(kind, train__steps=6, checkpoint__every_steps=3)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(config, whole)
    assert list(losses(whole)) == [1, 2, 3, 4, 5, 6]
    assert np.isfinite([*losses(whole).values(), *evaluations(whole).values()]).all()
    shutil.copytree(whole, cut)  # as it was before the last checkpoint was written
    shutil.rmtree(cut / "checkpoints" / "6")
    assert train(config, cut)
    assert "continuing from step 3" in capsys.readouterr().err
    found, expected = saved_state(cut), saved_state(whole)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert found[path].tobytes() == array.tobytes(), path
    assert losses(cut) == losses(whole)
    assert evaluations(cut) == evaluations(whole)
    carried = [path for path in expected if path.startswith("carry/")]
    assert bool(carried) == bool(config.model.carry)
    assert all(expected[path].any() for path in carried)
