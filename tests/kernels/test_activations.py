import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from lm.kernels.elementwise import ACTIVATIONS, GATED


def gelu_tanh(x):
    """Hendrycks and Gimpel 2016, §2."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_erf(x):
    return 0.5 * x * (1 + scipy.special.erf(x / np.sqrt(2)))


DEFINITIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu_erf": gelu_erf,
    "gelu_tanh": gelu_tanh,
    "silu": lambda x: x * scipy.special.expit(x),
    "reglu": lambda x: np.maximum(x, 0),
    "swiglu": lambda x: x * scipy.special.expit(x),
    "geglu": gelu_tanh,
    "geglu_erf": gelu_erf,
}
GRID = np.linspace(-8, 8, 402)  # does not hold 0, where relu has no slope


@pytest.mark.parametrize("name", DEFINITIONS)
def test_value_and_slope_are_the_published_ones(name):
    act, definition = jax.jit(ACTIVATIONS[name]), DEFINITIONS[name]
    x = jnp.asarray(GRID, jnp.float32)
    np.testing.assert_allclose(act(x), definition(GRID), atol=2e-6)
    slope = (definition(GRID + 1e-6) - definition(GRID - 1e-6)) / 2e-6
    np.testing.assert_allclose(jax.vmap(jax.grad(act))(x), slope, atol=2e-5)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_far_inputs_give_finite_values_and_slopes(name):
    x = jnp.array([-1e4, -50, 0, 50, 1e4], jnp.float32)
    np.testing.assert_allclose(ACTIVATIONS[name](x), [0, 0, 0, 50, 1e4], atol=1e-6)
    slopes = np.asarray(jax.vmap(jax.grad(ACTIVATIONS[name]))(x))
    np.testing.assert_allclose(slopes[[0, 1, 3, 4]], [0, 0, 1, 1], atol=1e-6)
    assert 0 <= slopes[2] <= 1


@pytest.mark.parametrize("name", DEFINITIONS)
def test_type_is_kept(name):
    x = jnp.asarray(GRID, jnp.bfloat16)
    y = ACTIVATIONS[name](x)
    assert y.dtype == jnp.bfloat16
    exact = DEFINITIONS[name](np.asarray(x, np.float64))
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=0.02, atol=0.02)


def test_every_activation_has_a_definition_here():
    assert set(ACTIVATIONS) == {*DEFINITIONS, "swiglu_clipped"}
    assert set(GATED) == {"reglu", "swiglu", "geglu", "geglu_erf", "swiglu_clipped"}


def test_clipped_swiglu_matches_gpt_oss():
    """`_apply_gate` of transformers' GptOssExperts: alpha 1.702, limit 7."""
    gate, x = np.meshgrid(np.linspace(-20, 20, 41), np.linspace(-20, 20, 41))
    cut = np.minimum(gate, 7)
    expected = (np.clip(x, -7, 7) + 1) * cut * scipy.special.expit(1.702 * cut)
    found = ACTIVATIONS["swiglu_clipped"](jnp.asarray(gate)) * GATED["swiglu_clipped"](x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
