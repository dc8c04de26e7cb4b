"""Products in 8 bits: exact for representable values, otherwise within the format's step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.kernels.quantized_matmul import FORMATS, quantize, quantized_matmul

# Largest error of a value over the largest of its row.
STEPS = {jnp.int8: 0.5 / 127, jnp.float8_e4m3fn: 2**-4, jnp.float8_e5m2: 2**-3}


def operands(shape, n_out, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)  # noqa: E731
    return draw(*shape), draw(shape[-1], n_out), draw(*shape[:-1], n_out)


@pytest.mark.parametrize("dtype", STEPS, ids=str)
@settings(deadline=None, max_examples=30)
@given(st.integers(0, 99), st.floats(-30, 30), st.sampled_from([-1, 0, (0, 1)]))
def test_rounded_array_is_within_half_a_step(dtype, seed, power, axes):
    x = np.random.default_rng(seed).normal(size=(3, 5, 7)).astype(np.float32) * 2.0**power
    x[1] = 0
    values, scales = quantize(jnp.asarray(x), dtype, axes)
    assert values.dtype == dtype
    back = np.asarray(values, np.float32) * np.asarray(scales)
    largest = np.abs(x).max(axes, keepdims=True)
    assert (np.abs(back - x) <= STEPS[dtype] * 1.001 * largest).all()


@pytest.mark.parametrize("precision", FORMATS)
def test_tiny_rows_give_no_nan_and_nan_is_not_hidden(precision):
    """A step whose loss is NaN is skipped; one with a tiny gradient is not."""
    x, kernel, g = operands((4, 8), 8)
    g = g.at[0].multiply(1e-37).at[1].set(0)
    multiply = lambda x, kernel: quantized_matmul(x, kernel, jnp.float32, precision)  # noqa: E731
    y, pullback = jax.vjp(multiply, x.at[2, 3].set(jnp.nan), kernel)
    np.testing.assert_array_equal(jnp.isnan(y).any(1), np.arange(4) == 2)
    dx, _ = pullback(g)
    assert jnp.isfinite(dx).all()
    dx, _ = pullback(g.at[3, 0].set(jnp.nan))
    np.testing.assert_array_equal(jnp.isnan(dx).any(1), np.arange(4) == 3)


@pytest.mark.parametrize("precision", FORMATS)
def test_products_of_small_integers_are_exact(precision):
    """Powers of two survive any scale; the largest of each row is the format's own largest."""
    rng = np.random.default_rng(0)
    x = 2.0 ** rng.integers(-3, 1, (4, 6))
    kernel = 2.0 ** rng.integers(-3, 1, (6, 5))
    limit = {"int8": 127 / 64, "fp8": 448 / 256}[precision]
    x[:, 0] = kernel[0] = limit
    if precision == "int8":
        x, kernel = np.round(x * 64) / 64, np.round(kernel * 64) / 64
    y = quantized_matmul(jnp.float32(x), jnp.float32(kernel), jnp.float32, precision)
    np.testing.assert_allclose(y, x @ kernel, rtol=1e-6)


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("shape", [(64, 32), (2, 32, 32)])
def test_values_and_gradients_are_near_those_of_float32(precision, shape):
    x, kernel, g = operands(shape, 48)

    def loss(multiply):
        return lambda x, kernel: (multiply(x, kernel) * g).sum()

    exact = jax.value_and_grad(loss(jnp.matmul), (0, 1))(x, kernel)
    multiply = lambda x, kernel: quantized_matmul(x, kernel, jnp.float32, precision)  # noqa: E731
    near = jax.value_and_grad(loss(multiply), (0, 1))(x, kernel)
    error = {"int8": 0.012, "fp8": 0.06}[precision]
    ours, theirs = multiply(x, kernel), x @ kernel
    assert np.linalg.norm(ours - theirs) < error * np.linalg.norm(theirs)
    for ours, theirs in zip(near[1], exact[1], strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours != theirs).any() or precision == "int8"
        assert np.linalg.norm(ours - theirs) < error * np.linalg.norm(theirs)


@pytest.mark.parametrize("precision", FORMATS)
def test_program_multiplies_in_8_bits(precision):
    x, kernel, _ = operands((8, 16), 4)
    loss = lambda x, k: quantized_matmul(x, k, jnp.bfloat16, precision).sum()  # noqa: E731
    step = jax.value_and_grad(loss, (0, 1))
    text = jax.jit(step).lower(x, kernel).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    narrow = "xi8>" if precision == "int8" else "xf8E"
    assert sum(narrow in line for line in products) == (2 if precision == "int8" else 3)
