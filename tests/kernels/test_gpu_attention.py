"""Masks as ranges of keys by query, and the kernels for GPUs that take them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.kernels.dot_product_attention import AttentionMask, attention
from lm.kernels.gpu_attention import _tokamax_mask, cudnn_takes_arrays
from lm.kernels.mask_ranges import bounds_by_query, most_pairs
from lm.kernels.triton_attention import triton_attention

B, L = 2, 64
PACKED = jnp.array([[1] * 20 + [2] * 15 + [3] * 20 + [0] * 9, [1] * L])
SOURCES = jnp.array([[1] * 10 + [2] * 30 + [3] * 24, [1] * 50 + [0] * 14])
PREFIX = jnp.array([[1] * 5 + [0] * 15 + [1] * 2 + [0] * 13 + [1] * 20 + [0] * 9, [0] * L])
MASKS = {
    "full": AttentionMask(False),
    "causal": AttentionMask(True),
    "packed": AttentionMask(True, PACKED),
    "encoder": AttentionMask(False, PACKED),
    "window": AttentionMask(True, window=10),
    "packed window": AttentionMask(True, PACKED, window=10),
    "encoder window": AttentionMask(False, PACKED, window=11),
    "global layer": AttentionMask(True, PACKED, window=10, is_global=jnp.array(True)),
    "prefix": AttentionMask(True, PACKED, prefix_BS=PREFIX),
    "prefix and window": AttentionMask(True, PACKED, prefix_BS=PREFIX, window=10),
    "cross": AttentionMask(False, PACKED, key_segments_BS=SOURCES),
}


def as_array(mask, n_queries=L, n_keys=L):
    found = mask.materialize(n_queries, n_keys)
    return np.ones((1, n_queries, n_keys), bool) if found is None else np.asarray(found)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_every_mask_is_a_range_of_keys_by_query(mask):
    start, end = (np.asarray(bound)[..., None] for bound in bounds_by_query(mask, L, L))
    keys = np.arange(L)
    np.testing.assert_array_equal((keys >= start) & (keys < end), as_array(mask))
    assert as_array(mask).sum((1, 2)).max() <= most_pairs(mask, L, L) + L  # half of the diagonal


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_tokamax_gets_the_same_mask(mask):
    pytest.importorskip("tokamax")
    found = _tokamax_mask(mask, L, L).as_array(L, L)
    found = jnp.broadcast_to(True if found is None else found, (B, 1, L, L))[:, 0]
    np.testing.assert_array_equal(found, np.broadcast_to(as_array(mask), (B, L, L)))


def test_cudnn_describes_masks_without_segments_and_prefixes():
    described = {name for name, mask in MASKS.items() if not cudnn_takes_arrays(mask)}
    assert described == {"full", "causal", "window"}


@pytest.mark.parametrize(
    ("name", "softcap", "head_dim", "lengths"),
    [
        ("causal", 0.0, 16, (L, L)),
        ("packed", 0.0, 24, (45, 45)),
        ("packed window", 5.0, 16, (L, L)),
        ("prefix", 0.0, 16, (L, L)),
        ("encoder", 5.0, 16, (L, L)),
        ("encoder window", 0.0, 16, (L, L)),
        ("cross", 0.0, 16, (L, L)),
        ("full", 0.0, 16, (50, 33)),
    ],
)
def test_triton_kernel_equals_plain_attention(name, softcap, head_dim, lengths):
    """Attention with sinks; queries without any key, which get the mean there, are left out."""
    mask, keys = MASKS[name], jax.random.split(jax.random.key(0), 4)
    for field, n in zip(("segments_BL", "key_segments_BS"), lengths, strict=True):
        if (segments := getattr(mask, field)) is not None:
            mask = replace(mask, **{field: segments[:, :n]})
    n_queries, n_keys = lengths
    shapes = (
        *((B, n_queries, 4, head_dim), (B, n_keys, 2, head_dim)),
        *((B, n_keys, 2, head_dim), (B, n_queries, 4, head_dim)),
    )
    q, k, v, g = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    sinks = jnp.array([-2.0, 0.0, 1.5, 30.0])
    sees = jnp.asarray(as_array(mask, *lengths).any(2))[:, :, None, None]
    kernel = partial(triton_attention, interpret=True)

    def out_and_gradients(attend):
        def loss(q, k, v, sinks):
            out = attend(q, k, v, mask, scale=0.3, softcap=softcap, sinks_H=sinks)
            out = jnp.where(sees, out, 0)
            return (out * g).sum(), out

        return jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(q, k, v, sinks)

    found, expected = out_and_gradients(kernel), out_and_gradients(attention)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


def test_query_without_keys_gives_0_and_no_gradients():
    mask = AttentionMask(False, jnp.ones((B, L), int), jnp.zeros((B, L), int))
    x = jnp.ones((B, L, 2, 16))
    kernel = partial(triton_attention, mask=mask, scale=1.0, interpret=True)
    out, back = jax.vjp(kernel, x, x, x)
    assert not out.any()
    assert not any(grad.any() for grad in back(out + 1))
