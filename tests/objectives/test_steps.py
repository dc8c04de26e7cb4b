"""The training step's computation, for any objective."""

import jax
import numpy as np
import pytest

from lm.config.registries import SCHEMA
from lm.errors import UserError
from lm.experiment import build

SGD = {  # an update is the gradient
    "optimizer__name": "sgd", "optimizer__learning_rate": 1.0, "optimizer__weight_decay": 0.0,
    "optimizer__clip_norm": 0.0, "optimizer__sgd__momentum": 0.0, "schedule__name": "constant",
}  # fmt: skip
ROWS, LENGTH, VOCAB = 8, 32, 64


@pytest.fixture
def make_experiment(tiny_config):
    return lambda **changes: build(
        tiny_config(model__vocab_size=VOCAB, **changes), jax.devices()[:1]
    )


def uneven_batch(seed=0):
    """Documents and padding of uneven lengths; row 5 holds no target at all."""
    rng = np.random.default_rng(seed)
    segments = np.cumsum(rng.random((ROWS, LENGTH)) < 0.1, axis=1) + 1
    lengths = np.array([32, 20, 7, 31, 1, 0, 12, 25])
    segments[np.arange(LENGTH) >= lengths[:, None]] = 0
    weights = rng.integers(0, 3, (ROWS, LENGTH)) * (segments > 0)
    return {
        "inputs": rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32),
        "targets": rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32),
        "weights": weights.astype(np.float32),
        "segment_ids": segments.astype(np.int32),
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH)),
    }


def steps_of(*batches):
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


def take_step(experiment, batch, edit=lambda state: state):
    """(state before, state after, metrics) of one step."""
    state = jax.device_get(edit(experiment.init_state()))
    after, metrics = experiment.train_steps(state, steps_of(batch))
    return state, jax.device_get(after), {name: x[0] for name, x in jax.device_get(metrics).items()}


def assert_equal_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def mean_loss(experiment, params, batch):
    """The definition: weighted mean of -log p(target)."""
    logits = experiment.model.apply(
        {"params": params}, batch["inputs"], batch["positions"], batch["segment_ids"]
    )
    nats = -(jax.nn.log_softmax(logits) * jax.nn.one_hot(batch["targets"], VOCAB)).sum(-1)
    return (nats * batch["weights"]).sum() / batch["weights"].sum()


@pytest.mark.parametrize("microbatches", [1, 4])
def test_sgd_step_is_the_gradient_of_the_mean_loss(make_experiment, microbatches):
    experiment = make_experiment(**SGD, train__microbatches=microbatches)
    batch = uneven_batch()
    before, after, metrics = take_step(experiment, batch)
    definition = jax.value_and_grad(lambda params: mean_loss(experiment, params, batch))
    loss, grads = jax.jit(definition)(before.params)
    jax.tree.map(
        lambda x, g, y: np.testing.assert_allclose(x - g, y, atol=1e-6),
        before.params,
        grads,
        after.params,
    )
    norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics["target_tokens"] == batch["weights"].sum()
    assert metrics["learning_rate"] == 1
    assert metrics["skipped"] == 0
    assert after.step == 1


@pytest.mark.parametrize(("microbatches", "where"), [(1, "params"), (4, "weights")])
def test_nonfinite_step_only_advances_the_counter(make_experiment, microbatches, where):
    experiment = make_experiment(train__microbatches=microbatches)
    batch = uneven_batch()
    if where == "weights":
        batch["weights"][0, 0] = np.inf

    def warm(state):  # one good step first, so that the optimizer's state is not zero
        state, _ = experiment.train_steps(state, steps_of(uneven_batch(1)))
        if where == "params":
            scale = state.params["stack"]["final_norm"]["scale"].at[3].set(np.nan)
            state.params["stack"]["final_norm"]["scale"] = scale
        return state

    before, after, metrics = take_step(experiment, batch, edit=warm)
    assert_equal_bits(before.params, after.params)
    assert_equal_bits(before.opt_state, after.opt_state)
    assert after.step == before.step + 1 == 2
    assert metrics["skipped"] == 1
    assert not np.isfinite(metrics["loss"])


def test_batch_without_targets_is_finite_and_has_no_gradient(make_experiment):
    batch = uneven_batch()
    batch["weights"] = np.zeros_like(batch["weights"])
    before, after, metrics = take_step(make_experiment(**SGD), batch)
    assert_equal_bits(before.params, after.params)
    assert metrics["loss"] == metrics["grad_norm"] == metrics["skipped"] == 0


def test_several_steps_in_one_dispatch_are_the_steps_one_by_one(make_experiment):
    experiment = make_experiment(model__dropout=0.2, schedule__warmup_steps=4)
    batch = uneven_batch()
    together, metrics = experiment.train_steps(experiment.init_state(), steps_of(batch, batch))
    state, singly = experiment.init_state(), []
    for _ in range(2):
        state, found = experiment.train_steps(state, steps_of(batch))
        singly.append(found)
    for name, values in metrics.items():
        one_by_one = np.concatenate([found[name] for found in singly])
        np.testing.assert_allclose(values, one_by_one, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(metrics["learning_rate"], [2.5e-4, 5e-4], rtol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), together.params, state.params
    )


def test_dropout_depends_on_seed_and_step_only(make_experiment):
    experiment = make_experiment(model__dropout=0.5, **SGD | {"optimizer__learning_rate": 0.0})
    batch = uneven_batch()
    state = experiment.init_state()
    losses = []
    for _ in range(2):
        state, metrics = experiment.train_steps(state, steps_of(batch))
        losses.append(float(metrics["loss"][0]))
    again = experiment.train_steps(experiment.init_state(), steps_of(batch))[1]
    assert float(again["loss"][0]) == losses[0]
    assert abs(losses[0] - losses[1]) > 1e-5  # the parameters are the same, the step is not


@pytest.mark.parametrize("kernel", SCHEMA["model.attention"].choices)
def test_attention_dropout_is_trained_with_or_rejected_at_once(make_experiment, kernel):
    try:
        experiment = make_experiment(model__attention=kernel, model__attention_dropout=0.1)
    except UserError:
        assert kernel != "auto"
        return
    jax.eval_shape(experiment.steps.train_step, experiment.state_shapes, experiment.batch_shapes)


def test_evaluation_gives_the_sums_of_each_batch_without_dropout(make_experiment):
    experiment = make_experiment(model__dropout=0.5)
    batches = [uneven_batch(seed) for seed in range(2)]
    params = experiment.init_state().params
    carry, sums = experiment.eval_steps(params, experiment.init_carry(ROWS), steps_of(*batches))
    assert carry == {}
    definition = jax.jit(lambda batch: mean_loss(experiment, params, batch))
    for i, batch in enumerate(batches):
        assert sums.weight[i] == batch["weights"].sum()
        assert sums.loss[i] / sums.weight[i] == pytest.approx(float(definition(batch)), rel=1e-5)


def test_seed_decides_the_initial_parameters(make_experiment):
    first, again, other = (
        jax.device_get(make_experiment(seed=seed).init_state()) for seed in (3, 3, 4)
    )
    assert_equal_bits(first, again)
    kernels = [state.params["tokens"]["embedding"].ravel() for state in (first, other)]
    assert np.corrcoef(kernels)[0, 1] < 0.1
