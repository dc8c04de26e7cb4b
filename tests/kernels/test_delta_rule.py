"""The gated delta rule in chunks against the recurrence itself, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.kernels.delta_rule import delta_rule, unit_lower_inverse

B, L, H, P, N = 2, 11, 4, 3, 5


def one_by_one(v, log_decay, rate, k, q, ids, state, chunk):
    """Equation 10 of Yang et al. 2024 with states that texts start at zero."""
    R = H // k.shape[2]
    k, q = (jnp.repeat(x, R, axis=2) for x in (k, q))
    outputs = []
    for t in range(v.shape[1]):
        same = ids[:, t] == (ids[:, t - 1] if t else 0)
        state = state * (same[:, None] * jnp.exp(log_decay[:, t]))[..., None, None]
        stored = jnp.einsum("bhpn,bhn->bhp", state, k[:, t])
        delta = rate[:, t, :, None] * (v[:, t] - stored)
        state = state + delta[..., None] * k[:, t, :, None]
        outputs.append(jnp.einsum("bhpn,bhn->bhp", state, q[:, t]))
    return jnp.stack(outputs, 1), state


@pytest.fixture
def operands():
    rng = np.random.default_rng(0)

    def make(groups):
        v, k, q = (rng.normal(size=s) for s in ((B, L, H, P), (B, L, groups, N), (B, L, groups, N)))
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
        log_decay, rate = -rng.uniform(0, 3, (B, L, H)), rng.uniform(0, 1, (B, L, H))
        log_decay[0, 4] = rate[0, 4] = 0
        ids = np.array([[0] * 2 + [1] * 5 + [2] * 4, [0] * 8 + [1] * 3])
        state = rng.normal(size=(B, H, P, N))
        return *map(np.float32, (v, log_decay, rate, k, q)), ids, np.float32(state)

    return make


@pytest.mark.parametrize(("groups", "chunk"), [(1, 4), (2, 3), (4, 64), (2, 1)])
def test_outputs_states_and_gradients_are_those_of_the_recurrence(operands, groups, chunk):
    *inputs, ids, state = operands(groups)

    def loss(run, *parts):
        *inputs, state = parts
        y, after = run(*inputs, ids, state, chunk)
        return (jnp.sin(y) * np.arange(P)).sum() + (after**2).sum(), (y, after)

    values = [
        jax.jit(jax.value_and_grad(lambda *x, run=run: loss(run, *x), range(6), has_aux=True))(
            *inputs, state
        )
        for run in (one_by_one, delta_rule)
    ]
    jax.tree.map(
        lambda wanted, found: np.testing.assert_allclose(
            found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max()
        ),
        *values,
    )


def test_the_inverse_is_exact_where_all_keys_are_alike():
    """Powers of this matrix reach 10^17; its inverse has ones and minus ones."""
    inverse = unit_lower_inverse(jnp.tril(jnp.ones((64, 64)), -1))
    np.testing.assert_array_equal(inverse, np.eye(64) - np.eye(64, k=-1))
