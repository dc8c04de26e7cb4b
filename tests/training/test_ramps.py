"""Growing batch sizes and lengths: every row once, in the order of equal batches."""

from __future__ import annotations

import shutil

import jax
import numpy as np
import pytest
from commands import evaluations, losses, saved_state

from lm.accounting.parameter_counts import training_cost
from lm.config import default, set_value
from lm.config.ramps import full_rows, rows_before, stages
from lm.errors import UserError
from lm.experiment import build_with_data, check
from lm.training.ramped_batches import ramped
from lm.training.trainer import train

RAMPS = {
    "data.batch_size": 8,
    "data.sequence_length": 16,
    "data.batch_ramp": "0: 2; 2: 4; 6: 8",
    "data.length_ramp": "0: 8; 4: 16",
}


@pytest.fixture
def ramped_config(make_kind):
    return make_kind("causal decoder", **RAMPS, **{"train.steps": 8, "model.dropout": 0.0})


def test_stages_are_those_of_both_ramps():
    config = default()
    for key, value in RAMPS.items():
        set_value(config, key, value)
    expected = [(0, 0, 2, 8), (2, 4, 4, 8), (4, 12, 4, 16), (6, 20, 8, 16)]
    assert stages(config.data) == expected
    assert [rows_before(config.data, step) for step in (0, 1, 3, 6, 8)] == [0, 2, 8, 20, 36]
    assert full_rows(config.data, 7) == (2 * 2 + 2 * 4) / 2 + 2 * 4 + 8
    assert full_rows(config.data, 3) == (2 * 2 + 4) / 2
    set_value(config, "data.batch_ramp", "")
    set_value(config, "data.length_ramp", "")
    assert stages(config.data) == [(0, 0, 8, 16)]


def test_every_row_is_in_one_batch_in_order(ramped_config):
    experiment, dataset = build_with_data(ramped_config, jax.devices()[:1])
    plain = experiment.train_batches(dataset, first_row=3)
    batches = ramped(experiment, plain)
    row = 0
    for step, (n, length) in enumerate([(2, 8)] * 2 + [(4, 8)] * 2 + [(4, 16)] * 2 + [(8, 16)]):
        at = batches.at(step)
        found = at.rows(step, range(at.batch_size))
        assert found["inputs"].shape == (n, length)
        for i in range(n):
            (whole,) = plain.rows(0, [row])["inputs"]
            np.testing.assert_array_equal(found["inputs"][i], whole[:length])
            row += 1


@pytest.mark.usefixtures("one_build")
def test_a_run_goes_on_within_a_stage_and_across_them(ramped_config, tmp_path):
    """On two devices; tokens of a step are those of its batch."""
    config = ramped_config
    set_value(config, "parallel.mesh.data", 2)
    set_value(config, "parallel.mesh.fsdp", 4)
    with pytest.raises(UserError, match=r"8 of step 0: .*batch_size=2 is not div"):
        train(config, tmp_path / "refused")
    set_value(config, "parallel.mesh.fsdp", 1)
    set_value(config, "parallel.mesh.tensor", 4)
    set_value(config, "checkpoint.every_steps", 3)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(config, whole)
    shutil.copytree(whole, cut)
    for step in (6, 8):
        shutil.rmtree(cut / "checkpoints" / str(step))
    assert train(config, cut)
    found, expected = saved_state(cut), saved_state(whole)
    assert {k: x.tobytes() for k, x in found.items()} == {
        k: x.tobytes() for k, x in expected.items()
    }
    assert losses(cut) == losses(whole)
    assert evaluations(cut) == evaluations(whole)


def test_cost_counts_the_tokens_of_the_ramps(ramped_config):
    experiment, _ = build_with_data(ramped_config, jax.devices()[:1])
    tokens, _ = training_cost(experiment)
    assert tokens == 2 * 2 * 8 + 2 * 4 * 8 + 2 * 4 * 16 + 2 * 8 * 16


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.batch_ramp": "0: 2; 5"}, "expected STEP: SIZE, not '5'"),
        ({"data.batch_ramp": "1: 2; 6: 8"}, "steps must ascend from 0, but 1 does not"),
        ({"data.batch_ramp": "0: 2; 6: 4; 6: 8"}, "steps must ascend from 0, but 6 does not"),
        ({"data.batch_ramp": "0: 2; 6: 4"}, "the last size must be --config.data.batch_size=8"),
        ({"data.batch_ramp": "0: 9; 6: 8"}, "9 is not between 1 and --config.data.batch_size=8"),
        ({"data.length_ramp": ";"}, "the last size must be --config.data.sequence_length=16"),
        ({"train.steps_per_dispatch": 4}, "step 2 is not a multiple of --config.train.steps_"),
        ({"train.microbatches": 4}, "2 rows are not divisible by --config.train.microbatches=4"),
        (
            {"objective.name": "prefix"},
            "length_ramp is not supported with --config.objective.name=prefix",
        ),
        ({"data.order": "contiguous"}, "is not supported with --config.data.order=contiguous"),
    ],
)
def test_what_is_refused(changes, words):
    config = default()
    for key, value in (RAMPS | changes).items():
        set_value(config, key, value)
    with pytest.raises(UserError) as error:
        check(config, "cpu", 1)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
