"""A sequence sharded over devices: losses and gradients of one device, with any other sharding."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from lm.data.batches import to_device
from lm.data.dataset import open_dataset
from lm.experiment import build_with_data, record_columns

STEPS = 3
MERGED_OVERRIDES = {
    "model__attention_dropout": 0.0,
    # The change of a parameter is the sum of its gradients.
    "optimizer__name": "sgd",
    "optimizer__sgd__momentum": 0.0,
    "optimizer__learning_rate": 0.5,
    "optimizer__clip_norm": 0.0,
    "optimizer__weight_decay": 0.0,
    "schedule__name": "constant",
}
# Kind, mesh, what else is set, and how attention crosses devices.
CASES = [
    ("causal decoder", {"data": 2, "context": 4}, {"train__loss_chunk": 8}, "ring"),
    (
        "causal decoder",
        {"context": 2, "fsdp": 2, "tensor": 2},
        {"parallel__sequence": True, "train__remat": "full"},
        "ring",
    ),
    ("causal decoder", {"context": 8}, {"model__attention": "blockwise"}, "ring"),
    ("masked encoder", {"context": 4, "fsdp": 2}, {}, "ring"),
    ("span_corruption encoder_decoder", {"context": 4, "tensor": 2}, {}, "gather"),
    ("seq2seq encoder_decoder", {"context": 4, "fsdp": 2}, {}, "ring"),
    (
        "transcription encoder_decoder",
        {"context": 2, "fsdp": 2, "tensor": 2},
        {"train__remat": "full"},
        "ring",
    ),
]


@pytest.fixture
def make(make_kind):
    """Make an experiment of a kind on a mesh."""

    def make(kind, mesh, **overrides):
        config = make_kind(kind, train__steps=STEPS, **MERGED_OVERRIDES, **overrides)
        config.parallel.mesh.update({"data": 1, **mesh})
        n_devices = int(np.prod([*mesh.values()], dtype=int))
        return build_with_data(config, jax.devices()[:n_devices])[0]

    return make


def train(experiment, start):
    """The losses from a state on, and the parameters after them."""
    dataset = open_dataset(experiment.config.data, record_columns(experiment.config))
    batches = experiment.train_batches(dataset)
    arrays = to_device(batches, range(STEPS), experiment.batch_sharding)
    state = jax.device_put(start, experiment.state_sharding)
    state, metrics = experiment.train_steps(state, arrays)
    return np.asarray(metrics["loss"]), jax.device_get(state.params)


ON_ONE_DEVICE: dict[str, Any] = {}  # of each kind: the first state, and what `train` makes of it


@pytest.mark.parametrize(("kind", "mesh", "options", "across"), CASES)
def test_losses_and_gradients_equal_those_of_one_device(make, kind, mesh, options, across):
    """With dropout of the residual stream, whose order is the sequence's on any mesh."""
    if kind not in ON_ONE_DEVICE:
        experiment = make(kind, {})
        start = jax.device_get(experiment.init_state())
        ON_ONE_DEVICE[kind] = start, train(experiment, start)
    start, (losses, params) = ON_ONE_DEVICE[kind]
    experiment = make(kind, mesh, **options)
    assert experiment.attention.across == across
    found, after = train(experiment, start)
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), after, params)
    moved = jax.tree.map(lambda x, y: abs(x - y).max(), params, start.params)
    assert max(jax.tree.leaves(moved)) > 1e-2
