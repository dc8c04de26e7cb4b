import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from lm.kernels.cross_entropy import cross_entropy


@pytest.fixture
def example():
    rng = np.random.default_rng(0)
    return rng.normal(scale=3, size=(2, 5, 11)), rng.integers(0, 11, (2, 5))


def picked(log_probabilities, targets):
    return np.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("shift", [0, 1e3, -1e3])
def test_equals_log_softmax(example, shift):
    logits, targets = example
    logits = np.float32(logits + shift)
    expected = -picked(scipy.special.log_softmax(np.float64(logits), axis=-1), targets)
    np.testing.assert_allclose(
        cross_entropy(jnp.asarray(logits), jnp.asarray(targets)),
        expected,
        atol=2e-4 if shift else 2e-6,
    )


def test_gradient_is_softmax_minus_one_hot(example):
    logits, targets = example
    weights = np.random.default_rng(1).random(targets.shape)
    grad = jax.grad(lambda x: (cross_entropy(x, jnp.asarray(targets)) * weights).sum())(
        jnp.asarray(logits, jnp.float32)
    )
    expected = (scipy.special.softmax(logits, axis=-1) - np.eye(11)[targets]) * weights[..., None]
    np.testing.assert_allclose(grad, expected, atol=1e-6)


def test_impossible_targets_are_finite_in_value_and_gradient():
    logits = jnp.array([[[1e4, -1e4, 0.0]]])
    value, grad = jax.value_and_grad(lambda x: cross_entropy(x, jnp.array([[1]])).sum())(logits)
    assert value == 2e4
    np.testing.assert_array_equal(grad, [[[1, -1, 0]]])


def test_bfloat16_logits_are_summed_in_float32(example):
    logits, targets = example
    rounded = jnp.asarray(logits, jnp.bfloat16)
    nats = cross_entropy(rounded, jnp.asarray(targets))
    assert nats.dtype == jnp.float32
    exact = -picked(scipy.special.log_softmax(np.asarray(rounded, np.float64), axis=-1), targets)
    np.testing.assert_allclose(nats, exact, atol=1e-5)
