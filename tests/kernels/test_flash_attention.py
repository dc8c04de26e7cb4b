"""The Pallas kernel with dropout and biases equals attention with all scores, in interpret mode."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32

from lm.kernels import flash_attention as flash
from lm.kernels import flash_tiles
from lm.kernels.dot_product_attention import NEG_INF, AttentionMask, Dropout
from lm.models.sharded_attention import attend_on_mesh
from lm.parallel.mesh import AXES, make_mesh, per_row_key, use_mesh

SEGMENTS = jnp.asarray(np.random.default_rng(0).integers(0, 3, (2, 150)).cumsum(1) // 60)
SOURCE = jnp.asarray(np.random.default_rng(1).integers(0, 3, (2, 40)).cumsum(1) // 14)
PREFIX = jnp.arange(150) < jnp.asarray([[70], [3]])
CASES = {
    "full": (AttentionMask(False), {}),
    "causal": (AttentionMask(True), {}),
    "segments": (AttentionMask(True, SEGMENTS), {"softcap": 2.0, "G": 1}),
    "prefix": (AttentionMask(True, SEGMENTS, prefix_BS=PREFIX), {"G": 1}),
    "window": (AttentionMask(True, window=50), {"bias": True}),
    "local layer": (AttentionMask(True, window=50, is_global=jnp.asarray(False)), {}),
    "global layer": (AttentionMask(True, window=50, is_global=jnp.asarray(True)), {}),
    "bias": (AttentionMask(False, SEGMENTS), {"bias": True, "softcap": 2.0}),
    "dropout": (AttentionMask(False), {"rate": 0.3, "G": 1}),
    "everything": (AttentionMask(True, SEGMENTS), {"rate": 0.3, "bias": True, "softcap": 3.0}),
    "cross": (AttentionMask(False, SEGMENTS, SOURCE), {"rate": 0.2, "S": 40}),
    "wide head": (AttentionMask(True), {"rate": 0.2, "bias": True, "K": 128}),
    "short": (AttentionMask(False), {"rate": 0.2, "bias": True, "L": 20, "S": 20}),
}


def all_scores(q, k, v, bias_HD, *, mask, scale, softcap, keep, rate):
    """Attention with all scores in memory and given dropout."""
    (_, L, H, _), S = q.shape, k.shape[1]
    k, v = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("BLHK,BSHK->BHLS", q * scale, k)
    scores = softcap * jnp.tanh(scores / softcap) if softcap else scores
    if bias_HD is not None:
        scores += bias_HD[:, jnp.arange(S) - jnp.arange(L)[:, None] + L - 1]
    visible = mask.materialize(L, S)
    scores = scores if visible is None else jnp.where(visible[:, None], scores, NEG_INF)
    weights = jax.nn.softmax(scores)
    return jnp.einsum("BHLS,BSHK->BLHK", jnp.where(keep, weights / (1 - rate), 0), v)


def threefry(key, counter):
    """Threefry-2x32-13 as Salmon et al. 2011 write it, of two Python integers."""
    words = [*key, key[0] ^ key[1] ^ 0x1BD11BDA]
    x, y = ((c + k) % 2**32 for c, k in zip(counter, key, strict=True))
    for i in range(13):
        r = (13, 15, 26, 6, 17, 29, 16, 24)[i % 8]
        x = (x + y) % 2**32
        y = (y << r | y >> (32 - r)) % 2**32 ^ x
        if i % 4 == 3:
            s = i // 4 + 1
            x, y = (x + words[s % 3]) % 2**32, (y + words[(s + 1) % 3] + s) % 2**32
    return x | y << 32


def reference_keep(words_BHW, L, S, rate):
    """Dropout's mask, weight by weight, from the definition in the module's docstring."""
    words, keep = np.asarray(words_BHW).tolist(), np.empty((*words_BHW.shape[:2], L, S), bool)
    for b, h, q, k in np.ndindex(keep.shape):
        bits = threefry(words[b][h], (q // 32 * 8 + q % 8, k)) >> 16 * (q // 8 % 4)
        keep[b, h, q, k] = bits % 2**16 >= round(rate * 2**16)
    return keep


def keep_of(words_BHW, L, S, rate):
    """Dropout's mask by the kernel's own function, for speed."""
    T, threshold = -(-L // 32) * 32, round(rate * 2**16)

    def one(words):
        return flash_tiles.keep_weights([words[0], words[1]], 0, 0, T, S, threshold)[:L]

    return jax.vmap(jax.vmap(one))(words_BHW)


def make_inputs(L, S, G, K, H=2):
    rng = np.random.default_rng(L)
    shapes = [(2, L, H, K), (2, S, G, K), (2, S, G, K), (2, L, H, K)]
    q, k, v, g = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    bias_HD = jnp.asarray(rng.normal(size=(H, L + S - 1)), jnp.float32)
    return q, k, v, bias_HD, jax.random.bits(jax.random.key(L), (2, H, 2)), g


def output_and_gradients(attend, g, *inputs):
    out, back = jax.vjp(attend, *inputs)
    return out, *(grad for grad in back(g) if grad is not None)


@pytest.mark.parametrize(
    ("case", "fused"), [*((case, True) for case in CASES), ("everything", False), ("cross", False)]
)
def test_values_and_gradients_equal_those_of_all_scores(case, fused, monkeypatch):
    monkeypatch.setattr(flash_tiles, "LARGEST_TILE", 128)
    if not fused:
        monkeypatch.setattr(flash, "WHOLE_QUERIES", 0)
    mask, sizes = CASES[case]
    L, S, rate = sizes.get("L", 150), sizes.get("S", 150), sizes.get("rate", 0.0)
    q, k, v, bias, words, g = make_inputs(L, S, sizes.get("G", 2), sizes.get("K", 16))
    options = {
        "mask": mask,
        "scale": q.shape[-1] ** -0.5,
        "softcap": sizes.get("softcap", 0.0),
        "rate": rate,
    }
    inputs = (q, k, v, *([bias] if sizes.get("bias") else []))

    def kernel(q, k, v, bias_HD=None):
        own = {"words_BHW": words if rate else None, "interpret": True}
        return flash.flash_attention(q, k, v, bias_HD=bias_HD, **options, **own)

    def reference(q, k, v, bias_HD=None):
        keep = keep_of(words, L, S, rate) if rate else True
        return all_scores(q, k, v, bias_HD, keep=keep, **options)

    found = jax.jit(partial(output_and_gradients, kernel))(g, *inputs)
    expected = jax.jit(partial(output_and_gradients, reference))(g, *inputs)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-5), found, expected)


def test_bits_of_dropout_match_the_generator():
    words_BHW = jax.random.bits(jax.random.key(0), (1, 2, 2))
    expected = reference_keep(words_BHW, 100, 9, 0.25)
    np.testing.assert_array_equal(keep_of(words_BHW, 100, 9, 0.25), expected)
    tile = flash_tiles.keep_weights([*words_BHW[0, 1]], jnp.asarray(64), 5, 32, 4, 2**14)
    np.testing.assert_array_equal(tile, expected[0, 1, 64:96, 5:])


def test_generator_gives_the_known_answers():
    """Those of Random123's `kat_vectors` for threefry2x32 with 13 rounds."""
    for word, answer in ((0, [0x9D1C5EC6, 0x8BD50731]), (2**32 - 1, [0xFD36D048, 0x2D17272C])):
        words = [np.asarray([word], np.uint32)] * 2
        assert [int(x[0]) for x in flash_tiles.threefry(words, words)] == answer


def test_with_twenty_rounds_the_generator_matches_jax(monkeypatch):
    monkeypatch.setattr(flash_tiles, "N_ROUNDS", 20)
    key, counter = np.array([7, 1 << 31], np.uint32), np.arange(8, dtype=np.uint32)
    found = flash_tiles.threefry([*key], [counter[:4], counter[4:]])
    np.testing.assert_array_equal(np.concatenate(found), threefry_2x32(key, counter))


def test_dropout_keeps_its_rate_and_neither_neighbors_nor_heads_are_alike():
    keep = np.asarray(keep_of(jax.random.bits(jax.random.key(1), (4, 4, 2)), 128, 128, 0.1), float)
    assert keep.mean() == pytest.approx(0.9, abs=5 * (0.09 / keep.size) ** 0.5)
    drawn = (keep - 0.9) / 0.3
    for axis in range(4):
        for step in (s for s in (1, 2, 3, 8, 16, 32) if s < keep.shape[axis]):
            with_other = (drawn * np.roll(drawn, step, axis)).mean()
            assert abs(with_other) < 5 * keep.size**-0.5


def attend_sharded(sizes, rate, inputs, mask):
    """Output and gradients over a mesh, whose kernels run in interpret mode."""
    q, k, v, bias_HD, _, g = inputs
    options = {"kernel": "flash", "context_attention": "gather", "scale": 0.3}
    key = per_row_key(jax.random.key(3))

    def attend(q, k, v, bias_HD):
        dropout = Dropout(key, rate)
        return attend_on_mesh(q, k, v, mask, bias_HLS=bias_HD, dropout=dropout, **options)

    mesh = make_mesh(
        {**dict.fromkeys(AXES, 1), **sizes}, jax.devices()[: math.prod(sizes.values())]
    )
    with use_mesh(mesh):
        return jax.jit(partial(output_and_gradients, attend))(g, q, k, v, bias_HD)


def test_dropout_and_gradients_do_not_depend_on_the_mesh(monkeypatch):
    monkeypatch.setattr(flash, "flash_attention", partial(flash.flash_attention, interpret=True))
    inputs = make_inputs(256, 256, 2, 8)
    segments = jnp.asarray(np.random.default_rng(0).integers(0, 2, (2, 256)).cumsum(1) // 60)
    mask = AttentionMask(True, segments)
    sizes = {"data": 2, "context": 2, "tensor": 2}
    found, expected = (attend_sharded(s, 0.3, inputs, mask) for s in (sizes, {"data": 1}))
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), found, expected)


def test_stages_of_a_pipeline_are_a_dimension_more():
    q, k, v, _, words, g = make_inputs(40, 40, 2, 16)

    def attend(words, q, k, v):
        options = {"scale": 0.3, "rate": 0.3, "interpret": True}
        return flash.flash_attention(q, k, v, AttentionMask(True), words_BHW=words, **options)

    stages = jax.tree.map(lambda x: x[:, None], (g, words, q, k, v))

    def both(g, words, q, k, v):
        return output_and_gradients(partial(attend, words), g, q, k, v)

    found = jax.jit(jax.vmap(both))(*stages)
    expected = jax.jit(both)(g, words, q, k, v)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x[:, 0], y, atol=2e-5), found, expected)
