"""Layers with windows among global ones: the same losses and gradients on every mesh."""

from __future__ import annotations

import jax
import numpy as np

from lm.data.batches import to_device
from lm.experiment import build_with_data

GEMMA = {
    "model__n_layers": 4,
    "model__window": 5,
    "model__global_every": 3,
    "model__rope_theta_local": 100.0,
    "model__norm_placement": "both",
    "model__norm_unit_offset": True,
    "model__attention_softcap": 5.0,
    "model__logit_softcap": 5.0,
    "train__loss_chunk": 8,
    # The change of a parameter is the sum of its gradients.
    "optimizer__name": "sgd",
    "optimizer__learning_rate": 0.5,
    "schedule__name": "constant",
    "train__steps": 2,
}
MESH = {"stage": 2, "context": 2, "tensor": 2}


def test_losses_and_gradients_equal_those_of_one_device(make_kind):
    """Layers in a circular pipeline, keys gathered over a cut length, heads on two devices."""
    trained, start = [], None
    for mesh, options in (({}, {}), (MESH, {"parallel__pipeline__repeats": 2})):
        config = make_kind("causal decoder", **GEMMA, **options)
        config.parallel.mesh.update({"data": 1, **mesh})
        n_devices = int(np.prod([*mesh.values()], dtype=int))
        experiment, dataset = build_with_data(config, jax.devices()[:n_devices])
        assert experiment.attention.kernel == "xla"
        batches = experiment.train_batches(dataset)
        arrays = to_device(batches, range(2), experiment.batch_sharding)
        start = start or jax.device_get(experiment.init_state())
        placed = jax.device_put(start, experiment.state_sharding)
        state, metrics = experiment.train_steps(placed, arrays)
        trained += [(np.asarray(metrics["loss"]), jax.device_get(state.params))]
    (expected, before), (losses, after) = trained
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), after, before)
