"""Stacks that are not one scan of sums, on meshes: wide streams, a dense prefix."""

import jax
import numpy as np
import pytest
from test_meshes import batches, experiment_on, first_state, losses

STACKS = {
    "concat": {"model__residual": "concat", "model__concat_width": 8},
    "hyper": {
        "model__residual": "hyper",
        "model__hyper_streams": 2,
        "model__value_residual": "learned",
    },
    "dense prefix, parallel": {
        "model__n_layers": 3,
        "model__n_experts": 4,
        "model__dense_layers": 1,
        "model__residual": "parallel",
        "model__qk_norm": True,
        "model__qk_norm_over": "each_head",
    },
}
MESH = {"fsdp": 2, "tensor": 2, "context": 2}


@pytest.fixture(scope="module", params=STACKS)
def stack(request):
    overrides = STACKS[request.param]
    experiment = experiment_on({}, **overrides)
    start = first_state(experiment)
    return overrides, start, losses(experiment, 5, start)


def test_losses_equal_those_of_one_device(stack):
    overrides, start, expected = stack
    found = losses(experiment_on(MESH, **overrides), 5, start)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_streams_pass_through_a_pipeline(stack):
    overrides, start, expected = stack
    if "model__hyper_streams" in overrides:
        found = losses(experiment_on({"stage": 2, "data": 2}, **overrides), 5, start)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_muon_orthogonalizes_layers_that_are_not_stacked():
    """A kernel [inputs, heads, head_dim] is a matrix of its first axis by the others."""
    changes = {**STACKS["concat"], "optimizer__name": "muon", "optimizer__weight_decay": 0.0}
    experiment = experiment_on({}, **changes)
    state = experiment.init_state()
    before = jax.device_get(state.params)
    state, _ = experiment.train_steps(state, batches(experiment, 1))
    for i in range(2):
        kernels = (tree["stack"]["layers"][str(i)]["attention"]["query"]["kernel"]
                   for tree in (jax.device_get(state.params), before))  # fmt: skip
        after, start = kernels
        values = np.linalg.svd((after - start).reshape(len(start), -1), compute_uv=False)
        # LayerNorm leaves one direction of the inputs without a gradient.
        assert values[-3] > 0.5 * values[0]
