"""Attention in tiles equals attention with all scores at once."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.kernels import blockwise_attention as blockwise
from lm.kernels.dot_product_attention import AttentionMask, Dropout, attention
from lm.models.sharded_attention import attend_on_mesh


def make_inputs(length, n_keys):
    """Queries, keys, values, and the gradient of the output."""
    rng = np.random.default_rng(length)
    shapes = [(length, 4), (n_keys, 2), (n_keys, 2), (length, 4)]
    return [jnp.asarray(rng.normal(size=(2, *s, 8)), jnp.float32) for s in shapes]


def make_segments(length):
    """Documents of uneven lengths, others in every row."""
    rng = np.random.default_rng(length)
    return jnp.asarray(np.cumsum(rng.random((2, length)) < 4 / length, axis=1) + 1)


def output_and_gradients(attend, q, k, v, g):
    def both(*qkv):
        out, back = jax.vjp(attend, *qkv)
        return out, back(g)

    return jax.jit(both)(q, k, v)


def equal(found, expected):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), found, expected)


SOURCE = make_segments(40)
# Every query has a key of its segment.
CROSS = AttentionMask(False, jnp.minimum(make_segments(24), SOURCE.max(1, keepdims=True)), SOURCE)


@pytest.mark.parametrize(
    ("visibility", "length", "n_keys", "softcap"),
    [
        (AttentionMask(True, make_segments(40)), 40, 40, 0.0),
        (AttentionMask(True), 40, 40, 0.7),
        (CROSS, 24, 40, 0.0),
        (AttentionMask(True, make_segments(40), window=5), 40, 40, 0.7),
        (AttentionMask(True, window=21), 40, 40, 0.0),
        (AttentionMask(True, SOURCE[:, 16:], SOURCE, 16, window=11), 24, 40, 0.0),
    ],
)
def test_blockwise_equals_xla(visibility, length, n_keys, softcap, monkeypatch):
    monkeypatch.setattr(blockwise, "LONGEST_TILE", 8)
    monkeypatch.setattr(blockwise, "SHORTEST_TILE", 4)
    inputs = make_inputs(length, n_keys)
    found, expected = (
        output_and_gradients(partial(attend, mask=visibility, scale=0.3, softcap=softcap), *inputs)
        for attend in (blockwise.blockwise_attention, attention)
    )
    equal(found, expected)


def test_query_without_visible_keys_gives_finite_values_and_no_gradients():
    q, k, v, _ = make_inputs(8, 8)
    nowhere = AttentionMask(False, jnp.ones((2, 8), int), jnp.zeros((2, 8), int))
    attend = partial(blockwise.blockwise_attention, mask=nowhere, scale=0.3)
    out, back = jax.vjp(attend, q, k, v)
    assert np.isfinite(out).all()
    assert all((grad == 0).all() for grad in back(out))


def test_tiles_are_equal_and_neither_long_nor_tiny():
    assert [blockwise.count_tiles(n) for n in (1, 512, 513, 1024, 2048, 3000)] == [1, 1, 3, 2, 4, 6]
    assert blockwise.count_tiles(1021) == 0  # a prime


def test_fused_kernels_reject_what_they_cannot_do():
    q, k, v, _ = make_inputs(8, 8)
    for kernel in ("blockwise", "cudnn"):
        attend = partial(attend_on_mesh, kernel=kernel, context_attention="gather", scale=1.0)
        with pytest.raises(ValueError, match="neither bias nor dropout"):
            attend(q, k, v, AttentionMask(True), bias_HLS=jnp.zeros((4, 8, 8)))
        dropout = Dropout(jax.random.key(0), 0.1)
        with pytest.raises(ValueError, match="neither bias nor dropout"):
            attend(q, k, v, AttentionMask(True), dropout=dropout)
    with pytest.raises(ValueError, match="no soft-cap"):
        attend(q, k, v, AttentionMask(True), softcap=1.0)
    for mask in (AttentionMask(True, offset=2), AttentionMask(True, prefix_BS=jnp.ones((2, 8)))):
        with pytest.raises(ValueError, match="blockwise"):
            blockwise.blockwise_attention(q, k, v, mask, 1.0)


def test_tiles_outside_of_a_window_are_never_computed():
    """Of 8 × 8 tiles the window reaches the diagonal and two before it."""
    pairs = dict(blockwise._tile_pairs(8, 8, (4, 4), blockwise.Band(0, 6)))
    assert {q - k for q, k in zip(*pairs[True], strict=True)} == {0, 1, 2}
    assert False not in pairs
