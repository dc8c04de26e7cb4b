import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformer_reference import draw, t5_bias, t5_buckets

from lm.models.attention import rotary_angles, rotate
from lm.models.encoder import Encoder
from lm.models.positions import (
    alibi_bias,
    alibi_slopes,
    position_bias,
    relative_buckets,
    sinusoidal,
)
from lm.models.transformer_config import TransformerConfig
from lm.parallel.mesh import AXES, make_mesh, use_mesh


def test_sinusoidal_is_the_formula_of_the_paper():
    """Vaswani et al. 2017, §3.5."""
    table = np.asarray(sinusoidal(jnp.arange(1000)[None], 16))
    assert table.shape == (1, 1000, 16)
    for position in (0, 1, 7, 999):
        for i in range(8):
            angle = position / 10_000 ** (2 * i / 16)
            assert table[0, position, 2 * i] == pytest.approx(np.sin(angle), abs=1e-4)
            assert table[0, position, 2 * i + 1] == pytest.approx(np.cos(angle), abs=1e-4)


@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_rotary_multiplies_complex_numbers(theta):
    """Su et al. 2021, eq. 12 and 15; the halves of a head are real and imaginary parts."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 9, 3, 8))
    positions = rng.integers(0, 500, (2, 9))
    rotated = rotate(jnp.asarray(x, jnp.float32), rotary_angles(jnp.asarray(positions), 8, theta))
    frequencies = theta ** (-2 * np.arange(4) / 8)
    turn = np.exp(1j * positions[..., None] * frequencies)[:, :, None]
    expected = (x[..., :4] + 1j * x[..., 4:]) * turn
    np.testing.assert_allclose(rotated[..., :4], expected.real, atol=2e-4)
    np.testing.assert_allclose(rotated[..., 4:], expected.imag, atol=2e-4)


def test_rotary_products_depend_on_the_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))

    @jax.jit
    def product(query_at, key_at):
        def turned(x, at):
            return rotate(x, rotary_angles(at[None, None], 16, 1e4))

        return (turned(q, jnp.asarray(query_at)) * turned(k, jnp.asarray(key_at))).sum()

    np.testing.assert_allclose(product(3, 3), (q * k).sum(), atol=1e-5)
    np.testing.assert_allclose(product(13, 4), product(109, 100), atol=1e-4)
    assert abs(product(13, 4) - product(13, 5)) > 1e-2


def test_rotary_model_does_not_see_where_a_row_starts(make_model):
    model, params = make_model(positions="rotary")
    tokens = np.random.default_rng(0).integers(0, 48, (1, 16))
    apply = jax.jit(model.apply)
    first, later, stretched = (
        apply({"params": params}, tokens, np.arange(16)[None] * by + start)
        for start, by in ((0, 1), (100, 1), (0, 2))
    )
    np.testing.assert_allclose(first, later, atol=1e-4)
    assert abs(first - stretched).max() > 1e-2


def test_bfloat16_vectors_are_rotated_in_float32():
    x = jax.random.normal(jax.random.key(0), (1, 64, 2, 8), jnp.bfloat16)
    angles = rotary_angles(jnp.arange(64)[None], 8, 1e4)
    out = rotate(x, angles)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, rotate(x.astype(jnp.float32), angles).astype(jnp.bfloat16))


@pytest.mark.parametrize("causal", [True, False])
def test_relative_buckets_match_t5(causal):
    distances = np.arange(-3000, 3001)
    buckets = jax.jit(lambda: relative_buckets(distances, not causal, 32, 128))()
    np.testing.assert_array_equal(buckets, t5_buckets(distances, causal))


class Bias(nn.Module):
    """Module of a position bias, as a stack is."""

    config: TransformerConfig
    bidirectional: bool

    @nn.compact
    def __call__(self, *args):
        return position_bias(self.config, self.bidirectional, *args)


@pytest.mark.parametrize("causal", [True, False])
def test_relative_bias_is_the_table_by_bucket_wherever_the_queries_start(causal):
    config = TransformerConfig(
        n_layers=1, d_model=8, n_heads=2, n_kv_heads=2, head_dim=4, d_ff=8, vocab_size=8,
        max_length=8, positions="relative",
    )  # fmt: skip
    module = Bias(config, not causal)
    params = nn.meta.unbox(module.init(jax.random.key(0), 4, 4, 0, False))
    apply = jax.jit(module.apply, static_argnums=(1, 2, 4))
    expected = t5_bias(np.asarray(params["params"]["relative_bias"]["embedding"]), 300, causal)
    np.testing.assert_allclose(apply(params, 300, 300, 0, False), expected, atol=1e-6)
    np.testing.assert_allclose(apply(params, 7, 300, 190, False), expected[:, 190:197], atol=1e-6)
    flash = Bias(dataclasses.replace(config, attention="flash"), not causal)
    with use_mesh(
        make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])
    ):  # the kernel reads it by distance
        by_distance = flash.apply(params, 300, 300, 0, True)
    np.testing.assert_allclose(by_distance[:, :300], expected[:, -1], atol=1e-6)
    np.testing.assert_allclose(by_distance[:, 299:], expected[:, 0], atol=1e-6)


def released_slopes(n):
    """`get_slopes` of github.com/ofirpress/attention_with_linear_biases."""
    if math.log2(n).is_integer():
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]
    closest = 2 ** math.floor(math.log2(n))
    return released_slopes(closest) + released_slopes(2 * closest)[0::2][: n - closest]


def test_alibi_slopes_match_the_paper():
    """Press et al. 2022, §3: 1/2 to 1/256 for 8 heads; the geometric mean of neighbors for 16."""
    np.testing.assert_array_equal(alibi_slopes(8), [1 / 2**h for h in range(1, 9)])
    np.testing.assert_allclose(alibi_slopes(16)[:4], [2**-0.5, 2**-1, 2**-1.5, 2**-2], rtol=1e-6)
    np.testing.assert_allclose(
        alibi_slopes(12), [1 / 2**h for h in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5],
        rtol=1e-6,
    )  # fmt: skip
    for n in range(1, 130):
        np.testing.assert_allclose(alibi_slopes(n), released_slopes(n), rtol=1e-6)


def test_alibi_bias_falls_with_the_distance():
    expected = -0.0625 * np.array([[0, 1, 2], [1, 0, 1], [2, 1, 0]])  # slope 2^-4, the first of two
    bias = alibi_bias(2, jnp.arange(3) - jnp.arange(3)[:, None])
    assert (bias.shape, bias.dtype) == ((2, 3, 3), jnp.float32)
    np.testing.assert_array_equal(bias, [expected, expected / 16])
    np.testing.assert_array_equal(
        alibi_bias(2, jnp.arange(9) - jnp.arange(5, 7)[:, None])[0],
        -0.0625 * np.array([[5, 4, 3, 2, 1, 0, 1, 2, 3], [6, 5, 4, 3, 2, 1, 0, 1, 2]]),
    )


def test_alibi_model_has_no_parameters_for_positions(make_model):
    (_, found), (_, expected) = (make_model(positions=name) for name in ("alibi", "none"))
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, expected)


def test_alibi_encoder_is_symmetric():
    """Read from right to left, a text has the same vectors; another order of tokens has others."""
    config = TransformerConfig(
        n_layers=2, d_model=32, n_heads=4, n_kv_heads=4, head_dim=8, d_ff=64, vocab_size=48,
        max_length=16, positions="alibi",
    )  # fmt: skip
    model = Encoder(config)
    tokens = np.random.default_rng(0).integers(0, 48, (1, 16))
    params = draw(model, tokens, method="hidden")
    apply = jax.jit(functools.partial(model.apply, {"params": params}, method="hidden"))
    forward = np.asarray(apply(tokens))
    np.testing.assert_allclose(apply(tokens[:, ::-1])[:, ::-1], forward, atol=1e-5)
    order = np.r_[1, 0, 2:16]
    assert abs(apply(tokens[:, order])[:, order] - forward).max() > 1e-2
