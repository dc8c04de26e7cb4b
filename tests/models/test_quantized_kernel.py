"""Kernels and tables in 8 and 4 bits, and products with them."""

from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.models import quantized_layers
from lm.models.quantized_kernel import QuantizedKernel, group_size, summed_axes
from lm.models.quantized_layers import lookup, tiled_product
from lm.models.variables import Kind, ParamInfo, Role

SIZES = st.sampled_from([1, 2, 3, 6, 8, 34, 64])


def info(kind, shape, inputs, outputs):
    return ParamInfo(Role(kind, inputs=inputs, outputs=outputs), ("one",) * len(shape))


@settings(max_examples=12)
@given(
    stacked=st.lists(st.sampled_from([1, 3]), max_size=1),
    inputs=st.lists(SIZES, min_size=1, max_size=2),
    outputs=st.lists(SIZES, min_size=1, max_size=2),
    is_table=st.booleans(),
    bits=st.sampled_from([8, 4]),
    seed=st.integers(0, 99),
)
def test_any_kernel_is_rounded_by_at_most_its_scale(stacked, inputs, outputs, is_table, bits, seed):
    if is_table:
        stacked, inputs, outputs = [], inputs[:1], outputs[:1]
    shape = (*stacked, *inputs, *outputs)
    kind = Kind.EMBEDDING if is_table else Kind.MATRIX
    about = info(kind, shape, len(inputs), len(outputs))
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    found = QuantizedKernel.quantize(jnp.asarray(x), about, jnp.float32, bits)
    assert found.shape == shape
    first, end = summed_axes(len(shape), about)
    n = prod(shape[first:end])
    assert (found.values.dtype == jnp.uint8) == (bits == 4 and n % 2 == 0)
    assert found.values.nbytes == prod(shape) // (2 if found.values.dtype == jnp.uint8 else 1)
    largest = np.abs(x).max(tuple(range(first, end)), keepdims=True)
    error = np.abs(found.unbox() - x)
    if found.values.dtype == jnp.int8:
        assert (error <= largest / 127 * 0.501).all()
    else:  # clipping loses at most 4/11 of the largest element, rounding half a step
        assert (error <= 0.37 * largest).all()
        assert np.square(error).mean() <= 0.02 * np.square(x).mean() + np.square(x).max() / 400
    again = QuantizedKernel.quantize(found.unbox(), about, jnp.float32, bits)
    np.testing.assert_allclose(again.unbox(), found.unbox(), rtol=1e-6)


def test_scales_in_4_bits_are_nearly_the_best_of_all():
    """Against an exhaustive search over 2,000 scales of either sign for each group of 32."""
    x = np.random.default_rng(0).standard_t(5, (32, 40)).astype(np.float32)
    box = QuantizedKernel.quantize(jnp.asarray(x), info(Kind.MATRIX, x.shape, 1, 1), "float32", 4)
    found = np.square(box.unbox() - x).sum(0)
    scales = np.linspace(-0.3, 0.3, 2000)[:, None, None] * np.abs(x).max(0)
    best = np.square(np.clip(np.round(x / scales), -8, 7) * scales - x).sum(1).min(0)
    assert (found < 1.2 * best).all()
    assert found.mean() < 1.04 * best.mean()


@given(st.integers(1, 5000))
def test_groups_are_even_parts_of_a_sum(n):
    size = group_size(n)
    assert (size == 0) == bool(n % 2)
    if size:
        assert size % 2 == 0
        assert n % size == 0
        assert size >= min(n, 32)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tile", [64 * 5, 64 * 70])
def test_tiled_product_equals_the_plain_product(bits, tile, monkeypatch):
    """With outputs that tiles do not divide, several axes, and one row."""
    monkeypatch.setattr(quantized_layers, "TILE", tile)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, 2, 64)), jnp.float32)
    for shape, outputs in (((64, 13), 1), ((64, 3, 4), 2), ((8, 8, 13), 1)):
        about = info(Kind.MATRIX, shape, len(shape) - outputs, outputs)
        kernel = jnp.asarray(rng.standard_normal(shape), jnp.float32)
        box = QuantizedKernel.quantize(kernel, about, jnp.float32, bits)
        expected = x.reshape(2, 64) @ box.unbox().reshape(64, -1)
        found = tiled_product(x, box, jnp.float32, outputs)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    table = jnp.asarray(rng.standard_normal((13, 64)), jnp.float32)
    box = QuantizedKernel.quantize(
        table, info(Kind.EMBEDDING, table.shape, 1, 1), jnp.float32, bits
    )
    found = tiled_product(x, box, jnp.float32, 0)
    np.testing.assert_allclose(found, x.reshape(2, 64) @ box.unbox().T, rtol=1e-4, atol=1e-4)
    ids = np.array([[3, 12], [0, 3]])
    np.testing.assert_array_equal(lookup(box, ids), box.unbox()[ids])
    assert jax.tree.structure(box) == jax.tree.structure(jax.tree.map(lambda a: a[:2], box))
