"""The pipeline's schedule, which affects nothing but speed."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from lm.data.batches import to_device
from lm.data.dataset import open_dataset
from lm.errors import UserError
from lm.experiment import build_with_data, record_columns
from lm.parallel.gradient_accumulation import select_rows
from lm.parallel.mesh import AXES, per_row_key, use_mesh
from lm.parallel.pipeline import PipelineSchedule, exchange_rounds, run_pipeline

# What each stage does in each iteration: microbatch and, after it, repeat; "--" is idle.
TABLES = {
    (2, 2, 1): """00 10 --
                  -- 00 10""",
    (3, 3, 2): """00 10 20 01 11 21 -- --
                  -- 00 10 20 01 11 21 --
                  -- -- 00 10 20 01 11 21""",
    (2, 4, 2): """00 10 20 30 01 11 21 31 --
                  -- 00 10 20 30 01 11 21 31""",
}  # fmt: skip


@pytest.mark.parametrize("sizes", TABLES)
def test_schedule(sizes):
    schedule = PipelineSchedule(*sizes)
    rows = [line.split() for line in TABLES[sizes].splitlines()]
    assert schedule.iterations == len(rows[0])
    assert schedule.bubble == rows[0].count("--") / len(rows[0])
    for stage, row in enumerate(rows):
        for iteration, expected in enumerate(row):
            microbatch, repeat, at_work = schedule.work(iteration, stage)
            assert (f"{microbatch}{repeat}" if at_work else "--") == expected


def test_every_group_of_layers_is_sent_once_and_each_stage_receives_one_a_round():
    for S in range(1, 9):
        for R in range(1, 7):
            rounds = exchange_rounds(S, R)
            assert sorted(group for groups in rounds for group in groups) == [*range(S * R)]
            for groups in rounds:
                assert [group // R for group in groups] == [*range(S)]
                assert sorted(group % S for group in groups) == [*range(S)]


def test_part_of_a_batch_draws_what_its_rows_draw():
    def draw(key, shape):
        one, two = jax.random.split(jax.random.fold_in(key, 5))
        return jnp.stack([jax.random.normal(one, shape), jax.random.uniform(two, shape)], axis=1)

    key = per_row_key(jax.random.key(3))
    whole = draw(key, (24, 5))
    assert len(np.unique(whole)) == whole.size
    np.testing.assert_array_equal(draw(select_rows(key, 1, 2), (12, 5)), whole[1::2])
    part = select_rows(select_rows(key, 1, 2), 6, 3)
    np.testing.assert_array_equal(draw(part, (2, 5)), whole[1::2][6::3])


# Stages, microbatches, repeats, layers of a group.
SIZES = [(2, 2, 1, 2), (2, 8, 1, 1), (4, 4, 1, 1), (4, 8, 1, 1), (2, 2, 3, 1), (4, 4, 2, 2),
         (4, 8, 3, 1), (2, 6, 2, 1)]  # fmt: skip


@pytest.mark.parametrize("sizes", SIZES)
def test_every_row_passes_every_layer_in_order_with_its_inputs(sizes):
    S, M, R, K = sizes
    N, B, D = S * R * K, 48, 8 // S
    shape = [S if axis == "stage" else D if axis == "data" else 1 for axis in AXES]
    mesh = jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    keys_N = jax.random.split(per_row_key(jax.random.key(0)), N)
    x_B, beside_B, common = np.arange(B), 7 * np.arange(B) + 1, jnp.array([2])

    def layer(number, key, x_B, beside_B, common):
        noise_B = jax.random.randint(key, x_B.shape, 0, 100)
        x_B = (5 * x_B + number + beside_B + noise_B + common[0]) % 9973
        return x_B, {"residue": jnp.stack([x_B % 7, x_B % 11], axis=1)}

    @jax.jit
    def run(params_N, x_B, beside_B):
        with use_mesh(mesh, pipeline=PipelineSchedule(S, M, R)):
            return run_pipeline(layer, params_N, keys_N, x_B, beside_B, common, 1)

    expected_B, expected_N = x_B, []
    for number, key in zip(range(N), keys_N, strict=True):
        expected_B, reported = layer(number, key, expected_B, beside_B, common)
        expected_N.append(reported["residue"])
    found_B, reported = run(np.arange(N), x_B, beside_B)
    np.testing.assert_array_equal(found_B, expected_B)
    np.testing.assert_array_equal(reported["residue"], np.stack(expected_N))


MESHES = {
    "stage=4,data=2": ({"stage": 4, "data": 2}, {}),
    "stage=2,fsdp=2,tensor=2": ({"stage": 2, "fsdp": 2, "tensor": 2}, {"microbatches": 4}),
    "stage=2,data=2,repeats=2": ({"stage": 2, "data": 2}, {"repeats": 2}),
    "stage=2,context=2": ({"stage": 2, "context": 2}, {}),
    "stage=2,expert=2,tensor=2": ({"stage": 2, "expert": 2, "tensor": 2}, {}),
    "stage=2,expert=2": ({"stage": 2, "expert": 2}, {"microbatches": 4}),
    "stage=2,expert=2,repeats=2": ({"stage": 2, "expert": 2}, {"repeats": 2}),
}
EXPERTS = {
    "model.n_experts": 4,
    "model.experts_per_token": 2,
    "model.balance_loss": 1.0,
    "model.router_z_loss": 0.1,
}
EVERY_OTHER = {"model.n_experts": 4, "model.experts_every": 2}
TRIED = [
    ("causal decoder", "stage=2,data=2,repeats=2", {}),
    ("masked encoder", "stage=2,fsdp=2,tensor=2", {}),
    ("masked encoder", "stage=4,data=2", {}),
    ("masked encoder", "stage=2,context=2", {}),
    ("causal decoder", "stage=2,expert=2,repeats=2", EXPERTS),
    ("span_corruption encoder_decoder experts", "stage=2,expert=2", {}),
    ("masked encoder", "stage=2,expert=2,tensor=2", EXPERTS | {"model.expert_capacity": 1.0}),
]


@pytest.fixture
def experiment_on(make_kind):
    """Make a kind of training with four layers, whose momentum after a step is the gradient."""

    def make(kind, mesh, options, **overrides):
        values = {"model.n_layers": 4, "optimizer.name": "sgd", "optimizer.clip_norm": 0.0}
        config = make_kind(kind, **{**values, **overrides})
        config.parallel.mesh.update({"data": 1, **mesh})
        config.parallel.pipeline.update(options)
        n_devices = int(np.prod([*mesh.values()], dtype=int))
        return build_with_data(config, jax.devices()[:n_devices])[0]

    return make


def batch(experiment, step):
    dataset = open_dataset(experiment.config.data, record_columns(experiment.config))
    return to_device(experiment.train_batches(dataset), [step], experiment.batch_sharding)


def two_steps(experiment, start):
    """The losses of two steps, and the gradient of the first."""
    start = jax.device_put(start, experiment.state_sharding)
    state, first = experiment.train_steps(start, batch(experiment, 0))
    gradient = jax.device_get(state.opt_state)
    _, second = experiment.train_steps(state, batch(experiment, 1))
    return [float(metrics["loss"][0]) for metrics in (first, second)], gradient


ON_ONE_DEVICE: dict[str, Any] = {}  # of each kind and its changes: first state, and `two_steps`


@pytest.mark.parametrize(("kind", "mesh", "changes"), TRIED)
def test_losses_and_gradients_with_dropout_equal_those_of_one_device(
    experiment_on, kind, mesh, changes
):
    key = f"{kind} {changes}"
    if key not in ON_ONE_DEVICE:
        single = experiment_on(kind, {}, {}, **changes)
        start = jax.device_get(single.init_state())
        ON_ONE_DEVICE[key] = start, two_steps(single, start)
    start, (expected_losses, expected) = ON_ONE_DEVICE[key]
    losses, gradient = two_steps(experiment_on(kind, *MESHES[mesh], **changes), start)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    for found, wanted in zip(*map(jax.tree.leaves, (gradient, expected)), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5 * float(abs(wanted).max()) + 1e-8)


def test_evaluation_under_a_pipeline_equals_that_of_one_device(experiment_on):
    def loss(mesh):
        experiment = experiment_on("causal decoder", mesh, {})
        carry = experiment.init_carry(experiment.config.eval.batch_size)
        params = experiment.init_state().params
        _, sums = experiment.eval_steps(params, carry, batch(experiment, 0))
        return float(sums.loss[0])

    assert loss({"stage": 2}) == pytest.approx(loss({}), rel=1e-5)


def test_activations_move_between_stages_and_no_parameter_is_gathered(experiment_on):
    experiment = experiment_on("causal decoder", *MESHES["stage=2,data=2,repeats=2"])
    for path, leaf in jax.tree.leaves_with_path(experiment.state_sharding.params["stack"]):
        assert leaf.spec[:1] == (("stage",) if path[0].key == "layers" else (None,))
    arrays = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct((1, *s.shape), s.dtype), experiment.batch_shapes
    )
    lowered = experiment.train_steps.lower(experiment.state_shapes, arrays)
    found = re.findall(r" (all-\S+|collective-\S+|reduce-scatter)\(", lowered.compile().as_text())
    assert {name.removesuffix("-start") for name in found} == {"collective-permute", "all-reduce"}


@pytest.mark.parametrize(
    ("mesh", "options", "overrides", "message"),
    [
        ({"stage": 2}, {}, {"model.n_layers": 3}, r"model.n_layers=3 is not divisible by 2 "),
        ({"stage": 2}, {}, {"model.residual": "concat"}, r"stage=2 .*model.residual=concat"),
        ({"stage": 2}, {"repeats": 3}, {}, r"model.n_layers=4 is not divisible by 6 .*repeats"),
        ({"stage": 4}, {"microbatches": 6}, {}, r"microbatches=6 is not a multiple of .*stage=4"),
        ({"stage": 2, "data": 2}, {"microbatches": 8}, {}, r"data.batch_size=8 .* by 16 "),
        ({"stage": 2}, {}, {"eval.batch_size": 3}, r"eval.batch_size=3 is not divisible by 2 "),
        ({"stage": 4}, {}, EVERY_OTHER, r"n_layers=4 is not .* by 8 .* × 2 layers of"),
    ],
)  # fmt: skip
def test_indivisible_sizes_are_errors(experiment_on, mesh, options, overrides, message):
    with pytest.raises(UserError, match=message):
        experiment_on("causal decoder", mesh, options, **overrides)


def test_only_transformers_have_stages(experiment_on):
    with pytest.raises(UserError, match=r"stage=2 needs --config.model.family decoder or encoder"):
        experiment_on("causal lstm", {"stage": 2}, {})
