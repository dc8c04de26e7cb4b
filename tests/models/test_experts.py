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
from lm.experiment import build_with_data, record_columns
from lm.kernels.grouped_matmul import GroupedKernel
from lm.models import sharded_experts
from lm.models.moe import MixtureOfExperts
from lm.models.transformer_config import TransformerConfig
from lm.parallel.mesh import ACTIVATIONS, axis_sizes, make_mesh, use_mesh

# Switch alternates and drops, Mixtral has biases here and drops nothing.
MERGED_OVERRIDES = {
    "model.dropout": 0.0,
    "model.attention_dropout": 0.0,
    "model.n_experts": 4,
    "model.balance_loss": 1.0,
    "model.router_z_loss": 0.1,
    "optimizer.name": "sgd",
    "optimizer.sgd.momentum": 0.0,
    "optimizer.learning_rate": 1.0,
    "optimizer.clip_norm": 0.0,
    "optimizer.weight_decay": 0.0,
    "schedule.name": "constant",
    "train.steps": 2,
}
KINDS = {
    "switch": ("span_corruption encoder_decoder experts", {"model.router_jitter": 0.0}),
    "mixtral": ("causal decoder", {"model.experts_per_token": 2}),
    "olmo and qwen": (
        "causal decoder",
        {
            "model.norm_placement": "output",
            "model.qk_norm": True,
            "model.qk_norm_over": "all",
            "model.expert_weights": "probability",
            "model.expert_d_ff": 12,
            "model.shared_expert_d_ff": 20,
            "model.shared_expert_gate": True,
        },
    ),
    "deepseek": (
        "causal decoder",
        {
            "model.mixer": "mla",
            "model.q_lora_rank": 12,
            "model.kv_lora_rank": 6,  # which no mesh divides by 4
            "model.qk_nope_head_dim": 6,
            "model.v_head_dim": 5,
            "model.n_kv_heads": 0,
            "model.bias": False,
            "model.n_layers": 3,
            "model.dense_layers": 1,
            "model.expert_d_ff": 24,
            "model.shared_expert_d_ff": 8,
            "model.router_scores": "sigmoid",
            "model.router_bias_rate": 0.1,
            "model.expert_groups": 2,
            "model.expert_groups_per_token": 1,
            "model.expert_weights_scale": 2.5,
        },
    ),
}
KINDS["gpt-oss and llama 4"] = (
    "causal decoder",
    {
        "model.attention_sinks": True,
        "model.window": 5,
        "model.window_chunks": True,
        "model.global_every": 2,
        "model.nope_every": 2,
        "model.nope_temperature": 0.5,
        "model.nope_temperature_length": 4,
        "model.rope_norm": True,
        "model.rope_fraction": 0.5,
        "model.activation": "swiglu_clipped",
        "model.router_bias": True,
        "model.router_scores": "sigmoid",
        "model.expert_weights_input": True,
        "model.residual_multiplier": 0.5,
        "model.logits_scaling": 2.0,
    },
)
ALL_AXES = {"fsdp": 2, "expert": 2, "tensor": 2}


@pytest.fixture
def build_on(make_kind):
    """Build a kind on a mesh, to be trained by plain gradient descent with step 1."""

    def build_on(kind, mesh, **changes):
        name, values = KINDS[kind]
        config = make_kind(name, **MERGED_OVERRIDES | values | changes)
        config.parallel.mesh.update({"data": 1, **mesh})
        n_devices = int(np.prod([*mesh.values()], dtype=int))
        return build_with_data(config, jax.devices()[:n_devices])[0]

    return build_on


def random_state(experiment):
    """A state of random parameters: biases too, none is at a special value."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        centre = path[-1].key == "scale"
        return np.float32(rng.normal(centre, 0.2, leaf.shape))

    shapes = experiment.state_shapes
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    params = jax.tree_util.tree_map_with_path(draw, shapes.params)
    return jax.device_put(state.replace(params=params), experiment.state_sharding)


@pytest.fixture
def run(build_on):
    """The metrics of two updates, and what they added to the parameters: minus the gradients."""

    def run(kind, mesh, **changes):
        experiment = build_on(kind, mesh, **changes)
        dataset = open_dataset(experiment.config.data, record_columns(experiment.config))
        batches = experiment.train_batches(dataset)
        arrays = to_device(batches, range(2), experiment.batch_sharding)
        state = random_state(experiment)
        before = jax.device_get(state.params)
        state, metrics = experiment.train_steps(state, arrays)
        added = jax.tree.map(np.subtract, jax.device_get(state.params), before)
        return jax.device_get(metrics), flatten_dict(added, sep="/")

    return run


def assert_equal(found, expected):
    """Metrics within 1e-5, and each gradient within 1e-5 of its largest entry."""
    for name, values in expected[0].items():
        np.testing.assert_allclose(found[0][name], values, rtol=1e-5, atol=1e-7, err_msg=name)
    for path, added in expected[1].items():
        largest = abs(added).max()
        # A bias of the keys moves all scores of a query alike: it has no gradient but rounding.
        assert largest > 0 or path.endswith("attention/key/bias"), path
        # The parameters themselves are rounded to 1e-7.
        np.testing.assert_allclose(
            found[1][path], added, atol=1e-5 * largest + 2e-7, rtol=0, err_msg=path
        )


@pytest.mark.parametrize("kind", KINDS)
def test_losses_gradients_and_reports_equal_those_of_one_device(run, kind):
    """On several devices also in microbatches: balance statistics are those of a row, and count
    as often as its targets."""
    expected = run(kind, {})
    metrics = expected[0]
    assert (metrics["dropped"] > 0).all() == (kind == "switch")
    # Both layers of experts add their losses.
    auxiliary = 2 * (metrics["balance_loss"] + 0.1 * metrics["router_z_loss"])
    np.testing.assert_allclose(metrics["loss"], metrics["nll"] + auxiliary, rtol=1e-5)
    parts = 2 if kind == "switch" else 1
    assert_equal(run(kind, ALL_AXES, **{"train.microbatches": parts}), expected)
    further = {"switch": {"data": 2, "expert": 4}, "deepseek": {"fsdp": 4, "context": 2}}
    further["gpt-oss and llama 4"] = {"stage": 2, "context": 2, "data": 2}
    if kind in further:
        assert_equal(run(kind, further[kind]), expected)


def assert_layer_equal_on(mesh, capacity=0.0, between=lambda: None):
    """Assert that loss and gradients of a layer on a mesh equal those on one device.

    `between` is called between the two.
    """
    config = TransformerConfig(
        n_layers=1, d_model=8, n_heads=2, n_kv_heads=2, head_dim=4, d_ff=6, vocab_size=32,
        max_length=10, n_experts=4, experts_per_token=2, expert_capacity=capacity, init_std=0.5,
    )  # fmt: skip
    layer = MixtureOfExperts(config, deterministic=False)
    rng = np.random.default_rng(0)
    x = np.float32(rng.normal(size=(8, 10, 8)))
    params = jax.jit(layer.init)(jax.random.key(0), x)
    params = jax.tree.map(lambda p: np.float32(rng.normal(0, 0.5, p.shape)), params)

    def loss(params, x):
        return (layer.apply(params, x) ** 2).sum()

    expected = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)
    between()
    n_devices = int(np.prod([*mesh.values()]))
    with use_mesh(make_mesh(axis_sizes("custom", mesh, n_devices), jax.devices()[:n_devices])):
        found = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)
    jax.tree.map(
        lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-5, atol=1e-5 * abs(e).max()),
        found,
        expected,
    )


@pytest.mark.parametrize("capacity", [0.0, 1.0])
def test_context_parallel_length(monkeypatch, capacity):
    """The context axis shards sequences, but an expert's capacity is still shared per row."""
    monkeypatch.setitem(ACTIVATIONS, "length", ("context",))
    assert_layer_equal_on({"expert": 2, "context": 2, "tensor": 2}, capacity)


@pytest.mark.parametrize("mesh", [{"data": 1}, ALL_AXES, {"data": 2, "fsdp": 2}])
def test_kernel_of_tpus(monkeypatch, mesh):
    """Interpreted: it multiplies weighted rows, biases included."""

    def use_megablox():
        kernel = GroupedKernel("megablox", interpret=True)
        monkeypatch.setattr(sharded_experts, "_grouped_kernel", lambda: kernel)

    assert_layer_equal_on(mesh, between=use_megablox)


def collectives(experiment):
    shapes = {
        name: jax.ShapeDtypeStruct((2, *s.shape), s.dtype)
        for name, s in experiment.batch_shapes.items()
    }
    text = experiment.train_steps.lower(experiment.state_shapes, shapes).compile().as_text()
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    return set(re.findall(rf" ({kinds})(?:-start)?\(", text))


def test_slots_are_exchanged_and_experts_stay_on_their_devices(build_on):
    found = collectives(build_on("switch", {"data": 2, "expert": 4}))
    assert found == {"all-to-all", "all-reduce"}


def test_experts_on_every_device_need_no_exchange(build_on):
    assert collectives(build_on("mixtral", {"data": 8})) == {"all-reduce"}


def test_invalid_meshes_are_errors(build_on):
    with pytest.raises(
        UserError, match=r"--config.model.n_experts=4 is not divisible by 8 .*expert"
    ):
        build_on("mixtral", {"expert": 8})
    with pytest.raises(UserError, match=r"batch_size=12 is not divisible by 8 \(8 data-parallel"):
        build_on("mixtral", {"data": 2, "expert": 4}, **{"data.batch_size": 12})
    with pytest.raises(UserError, match="the model has no experts"):
        build_on("mixtral", {"data": 2, "expert": 4}, **{"model.n_experts": 0})


def test_every_expert_is_on_one_device_of_its_axis(build_on):
    experiment = build_on("mixtral", {"data": 2, "expert": 4})
    params = random_state(experiment).params["stack"]["layers"]["feed_forward"]
    for kernel in (params["experts"][name]["kernel"] for name in ("in", "out")):
        assert {shard.data.shape[1] for shard in kernel.addressable_shards} == {1}


def test_router_biases_even_out_the_loads_on_any_mesh(build_on):
    """Wang et al. 2024: without an auxiliary loss, and to the bit the same on every mesh."""
    changes = {
        "model.router_bias_rate": 0.02,
        "model.balance_loss": 0.0,
        "model.router_z_loss": 0.0,
        "optimizer.learning_rate": 1e-3,
        "train.steps": 24,
    }
    biases, loads = [], {}
    for name, mesh, rate in (("one", {}, 0.02), ("eight", ALL_AXES, 0.02), ("without", {}, 0.0)):
        experiment = build_on("mixtral", mesh, **changes | {"model.router_bias_rate": rate})
        dataset = open_dataset(experiment.config.data, record_columns(experiment.config))
        batches = experiment.train_batches(dataset)
        arrays = to_device(batches, range(24), experiment.batch_sharding)
        state, metrics = experiment.train_steps(random_state(experiment), arrays)
        loads[name] = np.asarray(metrics["busiest_expert"])[-6:].mean()
        if rate:
            biases.append(flatten_dict(jax.device_get(state.model_state), sep="/"))
    (path,) = biases[0]
    assert path == "stack/layers/feed_forward/router_bias"
    assert biases[0][path].shape == (2, 4)
    assert np.abs(biases[0][path]).max() > 0.02
    np.testing.assert_array_equal(biases[0][path], biases[1][path])
    assert loads["one"] < loads["without"] - 0.1, loads
