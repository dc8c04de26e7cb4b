"""For every kind of training, an interrupted and resumed run equals an uninterrupted one."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from commands import evaluations, losses, saved_state
from kinds import KINDS

from lm.training.trainer import train

# Every objective and every family; a classifier's state is that of its family and a head.
RESUMED = [
    kind
    for kind in KINDS
    if kind != "span_corruption encoder_decoder"  # has experts beside it
    and (kind.endswith(" encoder") or not ("classification" in kind or "span_qa" in kind))
]


@pytest.mark.parametrize("kind", RESUMED)
@pytest.mark.usefixtures("one_device")
def test_going_on_changes_no_bit(make_kind, tmp_path, kind):
    config = make_kind(kind, train__steps=6, checkpoint__every_steps=3)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(config, whole)
    assert list(losses(whole)) == [1, 2, 3, 4, 5, 6]
    assert np.isfinite([*losses(whole).values(), *evaluations(whole).values()]).all()
    shutil.copytree(whole, cut)  # as it was before the last checkpoint was written
    shutil.rmtree(cut / "checkpoints" / "6")
    lines: list[str] = []
    assert train(config, cut, log=lines.append)
    assert "continuing from step 3" in lines
    found, expected = saved_state(cut), saved_state(whole)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert found[path].tobytes() == array.tobytes(), path
    assert losses(cut) == losses(whole)
    assert evaluations(cut) == evaluations(whole)
    carried = [path for path in expected if path.startswith("carry/")]
    assert bool(carried) == bool(config.model.carry)
    assert all(expected[path].any() for path in carried)


OPTIMIZERS = {
    "SOAP whose basis is refreshed after the cut": {"name": "soap", "soap.every": 3},
    "schedule-free": {"name": "schedule_free"},
    "an average in few bits": {"name": "ademamix", "ema": 0.9, "moments": "int8"},
    "cautious NorMuon with QK-clip": {
        "name": "muon",
        "cautious": "both",
        "muon.neuron_b2": 0.9,
        "qk_clip": 0.01,
    },
}


@pytest.mark.parametrize("case", OPTIMIZERS)
@pytest.mark.usefixtures("one_device")
def test_every_optimizer_goes_on(make_kind, tmp_path, case):
    options = {f"optimizer.{key}": value for key, value in OPTIMIZERS[case].items()}
    plain = {"train.steps": 4, "checkpoint.every_steps": 2, "schedule.name": "constant"}
    config = make_kind("causal decoder", **plain, **options)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(config, whole)
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "4")
    assert train(config, cut)
    found, expected = saved_state(cut), saved_state(whole)
    assert {path: x.tobytes() for path, x in found.items()} == {
        path: x.tobytes() for path, x in expected.items()
    }
    assert evaluations(cut) == evaluations(whole)


def test_experts_go_on_on_another_mesh(make_kind, tmp_path):
    """One expert a device, then two of them, each in two parts."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    changes = {
        "train.steps": 6,
        "checkpoint.every_steps": 3,
        "data.validation_fraction": 0.0,
        "model.n_experts": 4,
        "model.experts_every": 2,
        "model.expert_capacity": 1.0,
    }
    config = make_kind("causal decoder", **changes)
    config.parallel.mesh.update({"data": 2, "expert": 4})
    assert train(config, whole)
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "6")
    config.parallel.mesh.update({"data": 1, "fsdp": 2, "expert": 2, "tensor": 2})
    lines: list[str] = []
    assert train(config, cut, log=lines.append)
    assert "continuing from step 3" in lines
    found, expected = losses(cut), losses(whole)
    assert list(found) == list(expected) == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)
