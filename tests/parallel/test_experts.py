"""Experts on any mesh: losses, gradients, reports, and the communication compiled in."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from lm.data.batches import to_device
from lm.data.dataset import open_dataset
from lm.errors import UserError
from lm.experiment import build, reads_records
from lm.models.config import TransformerConfig
from lm.models.moe import MixtureOfExperts
from lm.parallel import rules
from lm.parallel.mesh import AXES, axis_sizes, make_mesh

# Switch alternates and drops, Mixtral has biases here and drops nothing.
KINDS = {
    "switch": ("span_corruption encoder_decoder experts", {}),
    "mixtral": (
        "causal decoder",
        {"model.n_experts": 4, "model.experts_per_token": 2, "model.router_z_loss": 1e-3},
    ),
}
MESHES = {
    "data=2,expert=4": {"data": 2, "expert": 4},
    "fsdp=2,expert=2,tensor=2": {"fsdp": 2, "expert": 2, "tensor": 2},
}
STEPS = 2


@pytest.fixture
def run(make_kind):
    """Plain gradient descent with step 1: its metrics, and what it added to the parameters."""

    def run(kind, mesh, **overrides):
        name, values = KINDS[kind]
        plain = {
            "optimizer.name": "sgd",
            "optimizer.sgd.momentum": 0.0,
            "schedule.name": "constant",
        }
        plain |= {"optimizer.learning_rate": 1.0, "optimizer.clip_norm": 0.0}
        plain |= {"optimizer.weight_decay": 0.0, "train.steps": STEPS}
        config = make_kind(name, **{**plain, **values, **overrides})
        config.parallel.mesh.update({"data": 1, **mesh})
        experiment = build(config, jax.devices()[: int(np.prod([*mesh.values()], dtype=int))])
        dataset = open_dataset(experiment.config.data, reads_records(experiment.config))
        batches = experiment.train_batches(dataset)
        arrays = to_device(batches, range(STEPS), experiment.batch_sharding)
        before = jax.device_get(experiment.init_state().params)
        state, metrics = experiment.train_steps(experiment.init_state(), arrays)
        after = jax.device_get(state.params)
        added = jax.tree.map(np.subtract, after, before)
        return jax.device_get(metrics), flatten_dict(added, sep="/")

    return run


def assert_equal(found, expected):
    """Metrics within 1e-5, and each gradient within 1e-5 of its largest entry."""
    for name, values in expected[0].items():
        np.testing.assert_allclose(found[0][name], values, rtol=1e-5, atol=1e-7, err_msg=name)
    for path, added in expected[1].items():
        largest = abs(added).max()
        assert largest > 0, path
        # The parameters themselves are rounded to 1e-7.
        np.testing.assert_allclose(
            found[1][path], added, atol=1e-5 * largest + 2e-7, rtol=0, err_msg=path
        )


@pytest.mark.parametrize("kind", KINDS)
def test_losses_gradients_and_reports_equal_those_of_one_device(run, kind):
    expected = run(kind, {})
    assert {"balance_loss", "router_z_loss", "busiest_expert", "dropped"} <= expected[0].keys()
    assert (expected[0]["dropped"] > 0).all() == (kind == "switch")
    # Each of the layers of experts adds its losses (0.01 is the default of model.balance_loss).
    assert (expected[0]["loss"] > expected[0]["nll"] + 0.02 * 0.99).all()
    for mesh in MESHES.values():
        assert_equal(run(kind, mesh), expected)


def test_microbatches_on_a_mesh_equal_one_batch_on_one_device(run):
    """Balance statistics are those of a row, and count as often as its targets."""
    plain = {"model.dropout": 0.0, "model.attention_dropout": 0.0, "model.router_jitter": 0.0}
    plain |= {"model.balance_loss": 1.0}
    expected = run("switch", {}, **plain)
    mesh = {"data": 2, "expert": 2}
    assert_equal(run("switch", mesh, **plain, **{"train.microbatches": 2}), expected)


@pytest.mark.parametrize("capacity", [0.0, 1.0])
def test_a_length_in_parts(monkeypatch, capacity):
    """Where the context axis divides sequences, an expert's places for a row are still shared."""
    monkeypatch.setitem(rules.ACTIVATIONS, "length", ("context",))
    config = TransformerConfig(
        n_layers=1, d_model=8, n_heads=2, n_kv_heads=2, head_dim=4, d_ff=6, vocab_size=32,
        max_length=10, n_experts=4, experts_per_token=2, expert_capacity=capacity, init_std=0.5,
    )  # fmt: skip
    layer = MixtureOfExperts(config, deterministic=False)
    x = np.float32(np.random.default_rng(0).normal(size=(4, 10, 8)))
    params = jax.jit(layer.init)(jax.random.key(0), x)
    mesh = make_mesh(
        axis_sizes("custom", {"expert": 2, "context": 2, "tensor": 2}, 8), jax.devices()
    )

    @jax.value_and_grad
    def loss(params, x):
        return (layer.apply(params, x) ** 2).sum()

    expected = jax.jit(loss)(params, x)
    with rules.activations_on(mesh):
        found = jax.jit(loss)(params, x)
    jax.tree.map(
        lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-5, atol=1e-5 * abs(e).max()),
        found,
        expected,
    )


def communication(make_kind, kind, mesh):
    """The collectives of a training step, with the shapes of their results."""
    name, values = KINDS[kind]
    config = make_kind(name, **values)
    config.parallel.mesh.update({"data": 1, **mesh})
    experiment = build(config, jax.devices())
    shapes = {
        name: jax.ShapeDtypeStruct((1, *s.shape), s.dtype)
        for name, s in experiment.batch_shapes.items()
    }
    text = experiment.train_steps.lower(experiment.state_shapes, shapes).compile().as_text()
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    return {kind for _, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text)}


def test_places_are_exchanged_and_no_expert_leaves_its_device(make_kind):
    found = communication(make_kind, "switch", {"data": 2, "expert": 4})
    assert found == {"all-to-all", "all-reduce"}


def test_experts_on_every_device_need_no_exchange(make_kind):
    assert communication(make_kind, "mixtral", {"data": 8}) == {"all-reduce"}


def test_meshes_that_do_not_fit_are_errors(make_kind):
    def on(kind, mesh, **values):
        config = make_kind(KINDS[kind][0], **KINDS[kind][1] | values)
        config.parallel.mesh.update({"data": 1, **mesh})
        return build(config, jax.devices())

    with pytest.raises(UserError, match=r"config.model.n_experts=4 is not divisible by 8 .*expert"):
        on("mixtral", {"expert": 8})
    with pytest.raises(UserError, match=r"batch_size=12 is not divisible by 8 \(8 data-parallel"):
        on("mixtral", {"data": 2, "expert": 4}, **{"data.batch_size": 12})
    with pytest.raises(UserError, match="the model has no experts"):
        on("mixtral", {"data": 2, "expert": 4}, **{"model.n_experts": 0})


def test_every_expert_is_on_one_device_of_its_axis(make_kind):
    config = make_kind(KINDS["mixtral"][0], **KINDS["mixtral"][1])
    config.parallel.mesh.update({"data": 2, "expert": 4})
    experiment = build(config, jax.devices())
    assert AXES.index("fsdp") < AXES.index("expert")
    kernel = experiment.init_state().params["stack"]["layers"]["feed_forward"]["experts"]["in"]
    shards = kernel["kernel"].addressable_shards
    assert {shard.data.shape[1] for shard in shards} == {1}
