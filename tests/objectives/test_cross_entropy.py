import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from lm.objectives.losses import cross_entropy

OPTIONS = [(0.0, 0.0), (0.1, 0.0), (0.0, 0.02), (0.3, 0.5)]  # label smoothing, z-loss


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
    losses = cross_entropy(jnp.asarray(logits), jnp.asarray(targets))
    for found in (losses.loss_BL, losses.nll_BL):
        np.testing.assert_allclose(found, expected, atol=2e-4 if shift else 2e-6)


def test_smoothing_and_z_loss_by_hand():
    """Probabilities 1/2, 1/4, 1/4 under a partition function of 4; a tenth is spread over three."""
    logits = jnp.log(jnp.array([[[2.0, 1.0, 1.0]]]))
    targets = jnp.array([[0]])
    smooth = (0.9 + 0.1 / 3) * np.log(2) + 2 * (0.1 / 3) * np.log(4)
    z = 0.5 * np.log(4) ** 2
    for options, expected in {
        (0.1, 0.0): smooth,
        (0.0, 0.5): np.log(2) + z,
        (0.1, 0.5): smooth + z,
    }.items():
        losses = cross_entropy(logits, targets, *options)
        assert float(losses.loss_BL[0, 0]) == pytest.approx(expected, rel=1e-6)
        assert float(losses.nll_BL[0, 0]) == pytest.approx(np.log(2), rel=1e-6)


def plain(logits, targets, label_smoothing, z_loss):
    """The same by the definition, for JAX to differentiate."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    wanted = jax.nn.one_hot(targets, logits.shape[-1])
    wanted = (1 - label_smoothing) * wanted + label_smoothing / logits.shape[-1]
    return -(wanted * jax.nn.log_softmax(logits)).sum(-1) + z_loss * log_z**2


@pytest.mark.parametrize(("label_smoothing", "z_loss"), OPTIONS)
def test_loss_and_gradient_match_the_definition(example, label_smoothing, z_loss):
    logits, targets = jnp.asarray(example[0], jnp.float32), jnp.asarray(example[1])
    weights = np.random.default_rng(1).normal(size=targets.shape)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def ours(x):
        loss = cross_entropy(x, targets, label_smoothing, z_loss).loss_BL
        return (loss * weights).sum(), loss

    (_, loss), grad = ours(logits)
    expected, pull = jax.vjp(lambda x: plain(x, targets, label_smoothing, z_loss), logits)
    np.testing.assert_allclose(loss, expected, rtol=2e-6)
    np.testing.assert_allclose(grad, pull(jnp.float32(weights))[0], atol=3e-6)


def test_gradient_is_softmax_minus_one_hot(example):
    logits, targets = example
    weights = np.random.default_rng(1).random(targets.shape)
    grad = jax.grad(lambda x: (cross_entropy(x, jnp.asarray(targets)).loss_BL * weights).sum())(
        jnp.asarray(logits, jnp.float32)
    )
    expected = (scipy.special.softmax(logits, axis=-1) - np.eye(11)[targets]) * weights[..., None]
    np.testing.assert_allclose(grad, expected, atol=1e-6)


def test_accuracy_counts_targets_with_the_largest_logit(example):
    logits, targets = example
    targets[0] = logits[0].argmax(-1)
    right = cross_entropy(jnp.asarray(logits), jnp.asarray(targets)).correct_BL
    np.testing.assert_array_equal(right, logits.argmax(-1) == targets)
    assert right.dtype == jnp.float32
    assert not right[1].all()


def test_only_the_loss_has_a_gradient(example):
    logits, targets = jnp.asarray(example[0], jnp.float32), jnp.asarray(example[1])

    def reported(x):
        losses = cross_entropy(x, targets, 0.1, 0.1)
        return losses.nll_BL.sum() + losses.correct_BL.sum()

    assert not jax.grad(reported)(logits).any()


def test_impossible_targets_are_finite_in_value_and_gradient():
    logits = jnp.array([[[1e4, -1e4, 0.0]]])
    value, grad = jax.value_and_grad(lambda x: cross_entropy(x, jnp.array([[1]])).loss_BL.sum())(
        logits
    )
    assert value == 2e4
    np.testing.assert_array_equal(grad, [[[1, -1, 0]]])


def test_bfloat16_logits_are_summed_in_float32(example):
    logits, targets = example
    rounded = jnp.asarray(logits, jnp.bfloat16)
    nats = cross_entropy(rounded, jnp.asarray(targets)).nll_BL
    assert nats.dtype == jnp.float32
    exact = -picked(scipy.special.log_softmax(np.asarray(rounded, np.float64), axis=-1), targets)
    np.testing.assert_allclose(nats, exact, atol=1e-5)
