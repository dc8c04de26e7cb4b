"""Moments in bfloat16 and bytes: exact error bounds, no drift, and the same learning."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lm.optim.compact_state import compact, from_bytes, round_to_bfloat16, to_bytes

STEP = 2 ** (1 / 8)
finite = st.one_of(st.just(0.0), st.floats(2.0**-30, 2.0**30, width=32))
finite = finite | finite.map(lambda x: -x)
arrays = hnp.arrays(np.float32, (2, 3, 8), elements=finite)


encode = jax.jit(to_bytes, static_argnums=2)


@settings(deadline=None)
@given(arrays, st.integers(0, 9), st.booleans())
def test_bytes_are_within_a_step_of_every_value_and_keep_signs_and_zeros(x, seed, second):
    if second:
        x = np.abs(x)
    code, scale = encode(jnp.asarray(x), jax.random.key(seed), second)
    assert code.dtype == jnp.int8
    assert scale.shape == (*x.shape[:-1], 1)
    y = np.asarray(from_bytes(code, scale, second), np.float64)
    smallest = np.asarray(scale, np.float64) * 2 ** (-126 / 8)
    if second:
        y, x = np.sqrt(y), np.sqrt(x)
        assert ((y > 0) == (x > 0)).all()
    size, x = np.abs(y), np.abs(x.astype(np.float64))
    large = x >= smallest
    assert (size[large] <= x[large] * STEP * 1.0001).all()
    assert (size[large] >= x[large] / STEP * 0.9999).all()
    assert (size[~large] <= np.broadcast_to(smallest, x.shape)[~large] * 1.0001).all()


@pytest.mark.parametrize("value", [0.3, -0.001, 1e-9, 3e4])
def test_rounding_keeps_the_mean(value):
    x = jnp.full((1, 100_000), value, jnp.float32)
    rounded = round_to_bfloat16(x, jax.random.key(0)).astype(jnp.float32)
    assert len(np.unique(rounded)) == 2
    np.testing.assert_allclose(rounded.mean(), value, rtol=1e-4)
    with_largest = x.at[0, 0].set(value * 7)  # the scale is not the value itself
    decoded = from_bytes(*to_bytes(with_largest, jax.random.key(1), second=False), second=False)
    np.testing.assert_allclose(decoded[0, 1:].mean(), value, rtol=1e-3)


def test_numbers_that_bfloat16_has_stay():
    x = jnp.asarray([[0.0, -0.0, 1.0, -2.5, jnp.inf, -jnp.inf]])
    np.testing.assert_array_equal(round_to_bfloat16(x, jax.random.key(0)), x)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_low_precision_moment_follows_tiny_gradient_steps(dtype):
    """With b2 = 0.999 a second moment moves by 0.1 % of the difference, the format by 1 to 9 %."""
    params = {"w": jnp.zeros((8, 64))}
    exact, inexact = optax.scale_by_adam(b2=0.999), compact(optax.scale_by_adam(b2=0.999), dtype)
    states = [optimizer.init(params) for optimizer in (exact, inexact)]

    @jax.jit
    def step(states, grads):
        updates, states = zip(
            *(o.update(grads, s, params) for o, s in zip((exact, inexact), states, strict=True)),
            strict=True,
        )
        return updates, list(states)

    for number in range(300):
        rng = np.random.default_rng(number)
        grads = {"w": jnp.asarray(rng.normal(1.0, 0.3, (8, 64)) * 2.0 ** np.arange(8)[:, None])}
        updates, states = step(states, grads)
    a, b = (np.asarray(u["w"]) for u in updates)
    assert states[1].state.mu["w"].dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(b.mean(), a.mean(), rtol=0.01)
    assert np.abs(b / a - 1).mean() < (0.02 if dtype == "bfloat16" else 0.15)
