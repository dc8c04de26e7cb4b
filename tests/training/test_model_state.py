"""Model state: equal on any mesh, saved, used and not changed in evaluation."""

from __future__ import annotations

import dataclasses
from math import prod

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lm.config import default
from lm.errors import UserError
from lm.experiment import build
from lm.models.decoder import Decoder
from lm.models.model_state import model_state
from lm.models.variables import as_variables, flat
from lm.runs.checkpoints import Checkpoints
from lm.runs.saved_params import mean_params, saved_checkpoints

ROWS, LENGTH, VOCAB = 8, 16, 64


class CountingLayer(nn.Module):
    """Adds a bias that follows how often ids of the first half of the vocabulary are read."""

    @nn.compact
    def __call__(self, x_BLD, tokens_BL):
        counts = model_state(self, "counts", jnp.zeros, (VOCAB,), ("vocab",), jnp.int32)
        last = model_state(self, "last", jnp.zeros, (), (), jnp.int32)
        x_BLD = x_BLD.at[..., 0].add(1e-3 * counts.value[tokens_BL].astype(x_BLD.dtype))
        counts.update(counts.value + jnp.zeros(VOCAB, jnp.int32).at[tokens_BL].add(1))
        last.update(10 * last.value + tokens_BL[:, 0].max())
        return x_BLD


class CountingDecoder(Decoder):
    """A decoder with model state beside its parameters."""

    def setup(self):
        super().setup()
        self.counting = CountingLayer()

    def embed(self, tokens_BL, *rest):
        x_BLD, positions_BL = super().embed(tokens_BL, *rest)
        return self.counting(x_BLD, tokens_BL), positions_BL


@pytest.fixture
def make(monkeypatch):
    """Make experiments with a counting decoder."""

    def make(mesh=None, **overrides):
        mesh = mesh or {"data": 1}
        config = default()
        config.model.update(n_layers=1, d_model=16, n_heads=2, vocab_size=VOCAB)
        config.data.update(batch_size=ROWS, sequence_length=LENGTH)
        config.optimizer.learning_rate = 1e-2
        for path, value in overrides.items():
            section, name = path.split("__")
            config[section][name] = value
        monkeypatch.setattr(
            "lm.experiment.make_model", lambda *args: CountingDecoder(make_model(*args).config)
        )
        config.parallel.mesh.update({"data": 1} | mesh)
        return build(config, jax.devices()[: prod(mesh.values())])

    from lm.models.transformer_config import make_model

    return make


def batch(seed=0, steps=1):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 10, (steps, ROWS, LENGTH + 1))
    return {
        "inputs": tokens[..., :-1].astype(np.int32),
        "targets": tokens[..., 1:].astype(np.int32),
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (steps, ROWS, LENGTH)),
        "segment_ids": np.ones((steps, ROWS, LENGTH), np.int32),
        "weights": np.ones((steps, ROWS, LENGTH), np.float32),
    }


def counts_of(arrays):
    return np.bincount(arrays["inputs"].ravel(), minlength=VOCAB)


def test_state_starts_fresh_and_follows_the_batches(make):
    experiment = make()
    state = experiment.init_state()
    assert {path: leaf.shape for path, leaf in flat(state.model_state).items()} == {
        "counting/counts": (VOCAB,),
        "counting/last": (),
    }
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.model_state))
    assert "counting" not in state.params
    arrays = batch(steps=3)
    state, _ = experiment.train_steps(state, arrays)
    np.testing.assert_array_equal(state.model_state["counting"]["counts"], counts_of(arrays))


@pytest.mark.parametrize("microbatches", [1, 2])
def test_result_is_bitwise_equal_on_any_mesh(make, microbatches):
    arrays, found = batch(steps=3), []
    for mesh in ({}, {"data": 2, "fsdp": 2, "tensor": 2}):
        experiment = make(mesh, train__microbatches=microbatches)
        sharding = experiment.state_sharding.model_state["counting"]["counts"]
        assert sharding.spec == PartitionSpec(("tensor",))
        state, _ = experiment.train_steps(experiment.init_state(), arrays)
        found.append(jax.device_get(state.model_state))
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_microbatches_run_in_order(make):
    """Row r is in microbatch r mod n; each starts from what the one before it left."""
    arrays, n = batch(), 4
    experiment = make(train__microbatches=n)
    state, _ = experiment.train_steps(experiment.init_state(), arrays)
    expected = 0
    for i in range(n):
        expected = 10 * expected + arrays["inputs"][0, i::n, 0].max()
    assert state.model_state["counting"]["last"] == expected
    np.testing.assert_array_equal(state.model_state["counting"]["counts"], counts_of(arrays))


def test_skipped_step_leaves_the_state_unchanged(make):
    experiment, arrays = make(), batch()
    state, _ = experiment.train_steps(experiment.init_state(), arrays)
    before = jax.device_get(state.model_state)
    arrays["weights"][0, 0, 0] = np.inf
    state, metrics = experiment.train_steps(state, arrays)
    assert metrics["skipped"][0] == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.model_state), before)


def test_evaluation_uses_model_state_without_changing_it(make):
    experiment, arrays = make(), batch(steps=2)
    state, _ = experiment.train_steps(experiment.init_state(), arrays)
    params = state.inference_params
    carry = experiment.init_carry(ROWS)
    _, sums = experiment.eval_steps(params, carry, batch(1))
    _, again = experiment.eval_steps(params, carry, batch(1, steps=1))
    assert sums.loss[0] == again.loss[0]
    fresh = dataclasses.replace(state, model_state=experiment.init_state().model_state)
    _, other = experiment.eval_steps(fresh.inference_params, carry, batch(1))
    assert other.loss[0] != sums.loss[0]
    logits = experiment.model.apply(as_variables(params), arrays["inputs"][0])
    assert logits.shape == (ROWS, LENGTH, VOCAB)


def test_run_continues_with_it(make, tmp_path):
    experiment, arrays = make(), batch(steps=4)
    first, second = ({k: v[i : i + 2] for k, v in arrays.items()} for i in (0, 2))
    state, _ = experiment.train_steps(experiment.init_state(), first)
    checkpoints = Checkpoints(
        tmp_path / "checkpoints", default().checkpoint, {"config": {"lora": {"alpha": 1.0}}}
    )
    checkpoints.save(2, state)
    checkpoints.wait()
    restored = checkpoints.restore(experiment.state_shapes, experiment.state_sharding, pytest.fail)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    shapes = flat(experiment.state_sharding.inference_params)
    found, _ = mean_params(saved_checkpoints(tmp_path, pytest.fail), 1, shapes, pytest.fail)
    expected = flat(jax.device_get(state.inference_params))
    assert found.keys() == expected.keys()
    assert "model_state/counting/counts" in found
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf)
        assert found[path].dtype == leaf.dtype
    continued, _ = experiment.train_steps(restored, second)
    state, _ = experiment.train_steps(experiment.init_state(), first)
    whole, _ = experiment.train_steps(state, second)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(continued), jax.device_get(whole))


def test_pipeline_rejects_it(make):
    with pytest.raises(UserError, match=r"parallel\.mesh\.stage=2: a pipeline cannot update model"):
        make({"stage": 2}, model__n_layers=2)


def test_shape_and_axes_must_match():
    class Wrong(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + model_state(self, "mean", jnp.zeros, (3,), ()).value

    with pytest.raises(ValueError, match="model state mean"):
        Wrong().init(jax.random.key(0), jnp.ones(3))
