from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from lm.objectives.losses import token_loss

B, T, D, V = 3, 12, 5, 11


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(B, T, V)).astype(np.float32) * 3
    targets = rng.integers(0, V, (B, T))
    targets[0, 3] = logits[0, 3].argmax()
    weights = rng.integers(0, 3, (B, T)).astype(np.float32)
    weights[0, 3] = 7
    return logits, targets, weights


@pytest.fixture
def loss_of(make_scorer):
    """The sums of a batch whose logits are given."""
    return lambda batch, *options: token_loss(make_scorer(0), *map(jnp.asarray, batch), *options)


def test_plain_loss_is_the_nats_of_weighted_targets(batch, loss_of):
    logits, targets, weights = batch
    sums = loss_of(batch)
    nats = right = 0.0
    for at in np.ndindex(B, T):
        nats -= weights[at] * scipy.special.log_softmax(logits[at])[targets[at]]
        right += weights[at] * (logits[at].argmax() == targets[at])
    assert float(sums.loss) == pytest.approx(nats, rel=1e-5)
    assert float(sums.metrics["nll"]) == pytest.approx(nats, rel=1e-5)
    assert float(sums.weight) == weights.sum()
    assert float(sums.metrics["accuracy"]) == right > 0


@pytest.mark.parametrize(("label_smoothing", "z_loss"), [(0.1, 0.0), (0.0, 0.02), (0.3, 0.5)])
def test_smoothing_spreads_the_target_over_the_vocabulary(batch, loss_of, label_smoothing, z_loss):
    """Reference: optax's smooth_labels, of Szegedy 2015 too; z-loss as t5's code writes it."""
    logits, targets, weights = batch
    sums = loss_of(batch, label_smoothing, z_loss)
    smooth = optax.smooth_labels(np.eye(V)[targets], label_smoothing)
    expected = optax.softmax_cross_entropy(logits, smooth)
    expected += z_loss * np.square(scipy.special.logsumexp(logits, axis=-1))
    assert float(sums.loss) == pytest.approx(float((expected * weights).sum()), rel=1e-5)
    plain = loss_of(batch)
    assert float(sums.weight) == float(plain.weight)
    for name in ("nll", "accuracy"):
        assert float(sums.metrics[name]) == pytest.approx(float(plain.metrics[name]), rel=1e-6)
    assert abs(float(sums.loss - plain.loss)) > 0.1


class Head(nn.Module):
    """A model of one layer, with dropout if it is not deterministic."""

    config: Any
    deterministic: bool = True

    def setup(self):
        self.kernel = self.param("kernel", nn.initializers.normal(1.0), (D, V))
        self.dropout = nn.Dropout(0.5, deterministic=self.deterministic)

    def logits(self, x_BTD):
        return self.dropout(x_BTD) @ self.kernel


def sums_and_gradients(chunk, deterministic, batch):
    """Of token_loss in parts of so many columns, by kernel and by what goes into it."""
    rng = np.random.default_rng(1)
    x, kernel = np.float32(rng.normal(size=(B, T, D))), np.float32(rng.normal(size=(D, V)))
    model = Head(SimpleNamespace(loss_chunk=chunk), deterministic)

    def loss(kernel, x):
        params, rngs = {"params": {"kernel": kernel}}, {"dropout": jax.random.key(0)}
        apply = nn.apply(lambda model: token_loss(model, x, *batch, 0.1, 0.01), model)
        sums = apply(params, rngs=rngs)
        return sums.loss, sums

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(kernel, x)


@pytest.mark.parametrize("chunk", [1, 5, 6])  # 12, 3 and 2 parts, of 5 columns the last too short
def test_a_loss_in_parts_is_the_whole_loss(batch, chunk):
    _, targets, weights = batch
    found = sums_and_gradients(chunk, True, (targets, weights))
    expected = sums_and_gradients(0, True, (targets, weights))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), found, expected
    )


def test_parts_drop_apart(batch):
    """Every column has the same input, target and weight; no two parts drop the same of it."""
    model = Head(SimpleNamespace(loss_chunk=1), deterministic=False)
    ones = jnp.ones((1, T, D)), jnp.zeros((1, T), int)
    params = {"params": {"kernel": jnp.asarray(np.eye(D, V), jnp.float32)}}
    rngs = {"dropout": jax.random.key(0)}

    @jax.jit
    def loss_at(weights_BT):
        return nn.apply(lambda model: token_loss(model, *ones, weights_BT), model)(
            params, rngs=rngs
        )

    losses = [float(loss_at(jnp.eye(T)[at][None]).loss) for at in range(T)]
    assert len({round(loss, 4) for loss in losses}) > 3
