"""Mamba-2's recurrence in chunks against the recurrence itself, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.kernels.state_space import state_space

B, L, H, P, N = 2, 11, 4, 3, 5


def one_by_one(x, dt, a, b, c, ids, state, chunk):
    """Equation 2 of Dao and Gu 2024 with states that texts start at zero."""
    R = H // b.shape[2]
    b, c = (jnp.repeat(y, R, axis=2) for y in (b, c))
    outputs = []
    for t in range(x.shape[1]):
        same = ids[:, t] == (ids[:, t - 1] if t else 0)
        state = state * same[:, None, None, None]
        decay = jnp.exp(dt[:, t] * a)[..., None, None]
        added = dt[:, t, :, None, None] * x[:, t, :, :, None] * b[:, t, :, None]
        state = decay * state + added
        outputs.append((state * c[:, t, :, None]).sum(-1))
    return jnp.stack(outputs, 1), state


@pytest.fixture
def operands():
    rng = np.random.default_rng(0)

    def make(groups):
        normal = [rng.normal(size=s) for s in ((B, L, H, P), (B, L, groups, N), (B, L, groups, N))]
        dt = rng.uniform(0, 0.5, (B, L, H))  # of steps far larger float32 loses digits
        dt[0, 4] = 0
        ids = np.array([[0] * 2 + [1] * 5 + [2] * 4, [0] * 8 + [1] * 3])
        state = rng.normal(size=(B, H, P, N))
        a = -rng.uniform(0.1, 16, H)
        x, b, c = map(np.float32, normal)
        return x, np.float32(dt), np.float32(a), b, c, ids, np.float32(state)

    return make


@pytest.mark.parametrize(("groups", "chunk"), [(1, 4), (2, 3), (4, 64), (2, 1)])
def test_outputs_states_and_gradients_match_the_recurrence(operands, groups, chunk):
    *inputs, ids, state = operands(groups)

    def loss(run, *parts):
        *inputs, state = parts
        y, after = run(*inputs, ids, state, chunk)
        return (jnp.sin(y) * np.arange(P)).sum() + (after**2).sum(), (y, after)

    parts = (*inputs, state)
    values = [
        jax.jit(jax.value_and_grad(lambda *x, run=run: loss(run, *x), range(6), has_aux=True))(
            *parts
        )
        for run in (one_by_one, state_space)
    ]
    jax.tree.map(
        lambda wanted, found: np.testing.assert_allclose(
            found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max()
        ),
        *values,
    )
