"""Every kind of training gives the same losses on any mesh."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from kinds import KINDS

from lm.data.batches import to_device
from lm.experiment import build_with_data

MESH = {"data": 2, "fsdp": 2, "tensor": 2}
STEPS = 12
ON_ONE_DEVICE: dict[str, Any] = {}


@pytest.fixture
def run(make_kind):
    """Trains a kind on a mesh: its losses, and the state after them."""

    def run(kind, mesh, **overrides):
        if not mesh and kind in ON_ONE_DEVICE:
            return ON_ONE_DEVICE[kind]
        config = make_kind(kind, train__steps=STEPS, **overrides)
        config.parallel.mesh.update({"data": 1, **mesh})
        n = int(np.prod([*mesh.values()], dtype=int))
        experiment, dataset = build_with_data(config, jax.devices()[:n])
        batches = experiment.train_batches(dataset)
        arrays = to_device(batches, range(STEPS), experiment.batch_sharding)
        state, metrics = experiment.train_steps(experiment.init_state(), arrays)
        found = np.asarray(metrics["loss"]), state
        if not mesh:
            ON_ONE_DEVICE[kind] = found
        return found

    return run


# Experts have their own: test_experts.py. Of the classifiers the one with most around its head:
# the other families are here with objectives of their own.
ALONE = {"classification encoder", "classification decoder", "classification lstm"}
ALONE |= {"token_classification decoder", "span_qa decoder", "span_qa encoder_decoder"}


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if "experts" not in kind and kind not in ALONE]
)
def test_losses_with_dropout_equal_those_of_one_device(run, kind):
    expected, _ = run(kind, {})
    assert expected[-3:].mean() < expected[:3].mean()  # later losses depend on every update
    found, state = run(kind, MESH)
    np.testing.assert_allclose(found[:6], expected[:6], rtol=1e-5)
    # More updates enlarge the differences in rounding of the first ones.
    np.testing.assert_allclose(found, expected, rtol=3e-4)
    for leaf in jax.tree.leaves(state.carry):
        assert len(leaf.addressable_shards[0].data) * 8 == len(leaf) * MESH["tensor"]


@pytest.mark.parametrize("kind", ["causal lstm", "masked encoder", "seq2seq encoder_decoder"])
def test_microbatches_on_a_mesh_equal_one_batch_on_one_device(run, kind):
    """Also what is carried from batch to batch goes to the microbatch of its row."""
    expected, before = run(kind, {})
    found, after = run(kind, {"data": 2, "fsdp": 2}, train__microbatches=2)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4),
        jax.device_get(after.carry),
        jax.device_get(before.carry),
    )
