"""The TPU kernel on pages equals attention with all scores, in interpret mode."""

from __future__ import annotations

from functools import wraps

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call, utils
from jax._src.state.indexing import NDIndexer
from jax._src.state.types import BitcastTransform, ReshapeTransform
from jax.experimental.pallas import tpu as pltpu

from lm.kernels import ragged_attention as ragged
from lm.kernels.dot_product_attention import AttentionMask, attention
from lm.kernels.paged_attention import PagedRows, paged_attention

P, M, LANES = 4, 5, ragged.LANES  # slots of a page, pages of a row


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Interpret TPU kernels, with views of references that JAX's interpreter does not know."""
    get = interpret_pallas_call.get

    @wraps(get)
    def get_view(token, device, core, space, buffer, transforms, *args, **kwargs):
        is_view = [not isinstance(t, NDIndexer) for t in transforms]
        n = is_view.index(True) if any(is_view) else len(transforms)
        first = transforms[:n]
        token, x = get(token, device, core, space, buffer, first, *args, **kwargs)
        for t in transforms[n:]:
            if isinstance(t, ReshapeTransform):
                x = x.reshape(t.shape)
            elif isinstance(t, BitcastTransform):  # packs neighbors of the last axis but one
                packing = np.dtype(t.dtype).itemsize // x.dtype.itemsize
                pairs = x.reshape(-1, packing, x.shape[-1]).swapaxes(1, 2)
                x = np.ascontiguousarray(pairs).view(t.dtype)[..., 0]
            else:
                x = x[utils.to_range([jax.tree.map(int, t)])]
        return token, x

    monkeypatch.setattr(interpret_pallas_call, "get", get_view)
    # Its masked stores are right for blocks of no more queries than heads that share a key.
    monkeypatch.setattr(ragged, "_MOST_QUERIES", 2)
    monkeypatch.setattr(ragged, "_MOST_PAGES", 2)
    with pltpu.force_tpu_interpret_mode():
        yield


def paged(keys_values, tables_BM):
    """Keys and values [B, S, G, K] in pages: of the kernel, of plain JAX by head and by slot."""
    n = tables_BM.max() + 1
    held = []
    for x in keys_values:
        pages = np.full((n, P, *x.shape[2:]), 7.0, np.float32)  # finite where nothing is written
        pages[tables_BM] = x.reshape(*tables_BM.shape, P, *x.shape[2:])
        held.append(pages.astype(x.dtype))
    pairs = np.stack(held, axis=3).reshape(n, P, -1, held[0].shape[-1])
    pairs = np.pad(pairs, ((0, 0),) * 3 + ((0, LANES - pairs.shape[-1]),))
    return jnp.asarray(pairs), [jnp.asarray(x.swapaxes(1, 2)) for x in held], held


def rows_and_inputs(L, H, G, K, dtype=np.float32):
    rng = np.random.default_rng(L)
    offsets_B = np.asarray([0, 13, 7], np.int32)
    tables_BM = rng.permutation(3 * M).reshape(3, M).astype(np.int32)
    rows = PagedRows(*map(jnp.asarray, (tables_BM, offsets_B, offsets_B + L)))
    q, k, v = (
        rng.normal(size=(3, n, heads, K)).astype(dtype)
        for n, heads in ((L, H), (P * M, G), (P * M, G))
    )
    return rows, jnp.asarray(q), (k, v)


@pytest.mark.parametrize(
    ("L", "heads", "dtype", "options"),
    [
        (1, (4, 2, 64), jnp.bfloat16, {}),
        (3, (4, 2, 128), jnp.float32, {"window": 5, "softcap": 2.0}),
        (2, (4, 1, 32), jnp.float32, {"softcap": 1.0}),
    ],
    ids=["decode", "chunk, window", "one key/value head"],
)
def test_equals_attention_with_all_scores(L, heads, dtype, options):
    rows, q_BLHK, keys_values = rows_and_inputs(L, *heads, dtype)
    pages, by_head, by_slot = paged(keys_values, np.asarray(rows.tables_BM))
    options = {"scale": 0.3, **options}
    out = ragged.ragged_attention(q_BLHK, pages, rows, **options)
    assert out.dtype == dtype
    tolerance = 2e-2 if dtype == jnp.bfloat16 else 1e-5

    def check(other, first=0):
        found = np.asarray(out, np.float32)[first : first + len(other)]
        np.testing.assert_allclose(found, np.asarray(other, np.float32), atol=tolerance)

    check(paged_attention(q_BLHK, by_head, rows, **options))
    check(paged_attention(q_BLHK, [*map(jnp.asarray, by_slot)], rows, slot_axis=1, **options))
    for i, offset in enumerate(np.asarray(rows.offsets_B)):
        mask = AttentionMask(True, offset=int(offset), window=options.get("window", 0))
        of_row = (x[i : i + 1] for x in (q_BLHK, *keys_values))
        own = {k: x for k, x in options.items() if k != "window"}
        check(attention(*of_row, mask, **own), i)


def test_rows_are_independent():
    """Another one may have other queries, or do nothing: no bit changes."""
    rows, q_BLHK, keys_values = rows_and_inputs(1, 4, 2, 128)
    pages, *_ = paged(keys_values, np.asarray(rows.tables_BM))
    out = ragged.ragged_attention(q_BLHK, pages, rows, scale=0.3)
    others = rows.replace(offsets_B=jnp.asarray([13, 19, 7]), lengths_B=jnp.asarray([14, 0, 8]))
    changed = q_BLHK.at[:2].multiply(-1)
    beside = ragged.ragged_attention(changed, pages, others, scale=0.3)
    np.testing.assert_array_equal(beside[2], out[2])
    assert np.isfinite(beside).all()
    assert (beside[:2] != out[:2]).any((1, 2, 3)).all()


def test_tables_that_fill_the_scalar_memory_are_read_in_parts(monkeypatch):
    rows, q_BLHK, keys_values = rows_and_inputs(1, 4, 2, 128)
    pages, *_ = paged(keys_values, np.asarray(rows.tables_BM))
    out = ragged.ragged_attention(q_BLHK, pages, rows, scale=0.3)
    monkeypatch.setattr(ragged, "_LARGEST_TABLE", 2 * LANES)
    np.testing.assert_allclose(
        ragged.ragged_attention(q_BLHK, pages, rows, scale=0.3), out, atol=1e-6
    )


@pytest.mark.parametrize(
    ("sizes", "word"),
    [
        ((32, 8, 128, "bfloat16", "bfloat16"), ""),
        ((4, 1, 64, "float32", "float32"), ""),
        ((4, 1, 64, "bfloat16", "float32"), "float32 keys"),
        ((12, 12, 64, "bfloat16", "bfloat16"), "12 key/value heads"),
        ((16, 16, 256, "bfloat16", "bfloat16"), "head_dim=256"),
        ((12, 12, 128, "float32", "float32"), "12 key/value heads"),
        ((8, 8, 128, "bfloat16", "int8"), "int8"),
        ((8, 8, 128, "float16", "float16"), "float16"),
    ],
)
def test_kernel_limits(sizes, word):
    problems = list(ragged.ragged_attention_problems(*sizes))
    assert bool(problems) == bool(word)
    assert word in "".join(problems)
