"""The LSTM recurrence and its gradient against the paper's equations, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from lm.kernels.lstm_scan import LstmState, SegmentStarts, lstm_scan

B, L, H = 2, 6, 3
HERE = np.zeros((B, L), bool)
HERE[0, 2] = HERE[1, 0] = HERE[1, 5] = True


def draw(seed):
    rng = np.random.default_rng(seed)
    shapes = {
        "gates": (B, L, 4 * H), "kernel": (H, 4 * H), "hidden": (B, H), "cell": (B, H),
        "start_hidden": (B, L, H), "start_cell": (B, L, H),
    }  # fmt: skip
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def run(a, starts, reverse):
    entering = LstmState(a["start_hidden"], a["start_cell"]) if starts == "given" else None
    where = SegmentStarts(jnp.asarray(HERE), entering) if starts else None
    a = jax.tree.map(jnp.float32, a)
    before = LstmState(a["hidden"], a["cell"])
    return lstm_scan(
        a["gates"], a["kernel"], before, where, reverse=reverse, dtype=jnp.dtype("float32")
    )


def loop(a, starts, reverse):
    """Zaremba et al. 2014, equations of §3.1, float64."""
    hidden, cell = np.zeros((2, B, L, H))
    for b in range(B):
        h, c = a["hidden"][b], a["cell"][b]
        for t in range(L)[::-1] if reverse else range(L):
            if starts and HERE[b, t]:
                h, c = np.zeros((2, H))
                if starts == "given":
                    h, c = a["start_hidden"][b, t], a["start_cell"][b, t]
            i, f, g, o = (a["gates"][b, t] + h @ a["kernel"]).reshape(4, H)
            i, f, o = scipy.special.expit([i, f, o])
            c = f * c + i * np.tanh(g)
            h = o * np.tanh(c)
            hidden[b, t], cell[b, t] = h, c
    return LstmState(hidden, cell)


CASES = pytest.mark.parametrize(
    ("starts", "reverse"),
    [(starts, reverse) for starts in (None, "zero", "given") for reverse in (False, True)],
)


@CASES
def test_states_match_the_equations(starts, reverse):
    a = draw(0)
    found, expected = run(a, starts, reverse), loop(a, starts, reverse)
    np.testing.assert_allclose(found.hidden, expected.hidden, atol=1e-6)
    np.testing.assert_allclose(found.cell, expected.cell, atol=1e-6)


@CASES
def test_gradients_are_the_slopes_of_the_equations(starts, reverse):
    a, weights = draw(0), LstmState(*np.random.default_rng(1).normal(size=(2, B, L, H)))

    def total(states):
        return sum((w * x).sum() for w, x in zip(weights, states, strict=True))

    grads = jax.jit(jax.grad(lambda a: total(run(a, starts, reverse))))(a)
    for name, x in a.items():
        slopes = np.zeros_like(x)
        for place in np.ndindex(x.shape):
            ends = []
            for step in (1e-5, -1e-5):
                moved = x.copy()
                moved[place] += step
                ends.append(total(loop(a | {name: moved}, starts, reverse)))
            slopes[place] = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(grads[name], slopes, atol=2e-5, err_msg=name)


def test_products_are_of_the_compute_type():
    a = draw(0)

    def states(gates, kernel, before):
        return lstm_scan(gates, kernel, before, dtype=jnp.dtype("bfloat16"))

    inputs = jax.tree.map(jnp.float32, (a["gates"], a["kernel"], LstmState(a["hidden"], a["cell"])))
    slope = jax.jit(jax.grad(lambda *inputs: states(*inputs).hidden.sum(), (0, 1, 2)))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(slope(*inputs)))
    products = [line for line in slope.lower(*inputs).as_text().splitlines() if "dot_gen" in line]
    assert len(products) == 3  # forwards, backwards, and the gradient of the kernel
    for line in products:
        operands, result = line.rsplit(" : ", 1)[1].split("->")
        assert "xf32" not in operands, line
        assert "xf32" in result, line
