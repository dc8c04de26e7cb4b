import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.kernels.dot_product_attention import AttentionMask, Dropout
from lm.kernels.dot_product_attention import attention as xla_attention
from lm.kernels.mask_ranges import bounds_by_query
from lm.kernels.tiled_attention import tiled_attention

KERNELS = {"xla": xla_attention, "tiled": tiled_attention}


def attention(q, k, v, mask, kernel="xla", **options):
    return KERNELS[kernel](q, k, v, mask, scale=q.shape[-1] ** -0.5, **options)


run = jax.jit(attention, static_argnames=("kernel", "softcap"))


def naive_attention(
    q, k, v, causal, query_segments, key_segments, offset, window=10**9, cap=None, sinks=None
):
    """Equation 1 of Vaswani et al. 2017, one query and one head at a time, in float64.

    A sink is a score beside the others whose value is 0 (gpt-oss, 2025).
    """
    n_rows, n_queries, n_heads, width = q.shape
    out = np.zeros(q.shape)
    for b, i, h in np.ndindex(n_rows, n_queries, n_heads):
        group = h * k.shape[2] // n_heads
        seen = [
            j
            for j in range(k.shape[1])
            if not (causal and not offset + i - window < j <= offset + i)
            and query_segments[b, i] == key_segments[b, j]
        ]
        scores = np.array([q[b, i, h] @ k[b, j, group] for j in seen]) / np.sqrt(width)
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        sink = -np.inf if sinks is None else sinks[h]
        largest = max(scores.max(), sink)
        weights = np.exp(scores - largest)
        total = weights.sum() + np.exp(sink - largest)
        out[b, i, h] = weights / total @ v[b, seen, group]
    return out


def make_inputs(length, n_kv_heads, n_keys=None, n_heads=4, head_dim=8, batch=2):
    rng = np.random.default_rng(length + n_kv_heads)
    q = rng.normal(size=(batch, length, n_heads, head_dim))
    k, v = rng.normal(size=(2, batch, n_keys or length, n_kv_heads, head_dim))
    return q, k, v


def make_segments(length, batch=2):
    """Documents of uneven lengths, others in every row."""
    rng = np.random.default_rng(length)
    return np.cumsum(rng.random((batch, length)) < 0.15, axis=1) + 1


def as_float32(*arrays):
    return [jnp.asarray(x, jnp.float32) for x in arrays]


@pytest.mark.parametrize(("kernel", "causal"), [("xla", False), ("xla", True), ("tiled", True)])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize(("length", "n_kv_heads"), [(130, 2), (33, 4), (1, 2)])
def test_equals_the_definition(kernel, causal, segmented, length, n_kv_heads):
    q, k, v = make_inputs(length, n_kv_heads)
    one = np.ones((2, length), int)
    segments = make_segments(length) if segmented else one
    visibility = AttentionMask(causal, *([jnp.asarray(segments)] * 2 if segmented else []))
    out = run(*as_float32(q, k, v), visibility, kernel=kernel)
    expected = naive_attention(q, k, v, causal, segments, segments, 0)
    np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.parametrize("is_global", [None, False, True])
@pytest.mark.parametrize(("length", "window", "cap"), [(33, 5, 0.0), (12, 1, 0.7)])
def test_windows_and_softcaps_equal_the_definition(length, window, cap, is_global):
    q, k, v = make_inputs(length, 2)
    segments = make_segments(length)
    visibility = AttentionMask(True, jnp.asarray(segments), window=window)
    if is_global is not None:
        visibility = visibility.replace(is_global=jnp.asarray(is_global))
    out = run(*as_float32(q, k, v), visibility, softcap=cap)
    reach = 10**9 if is_global else window
    expected = naive_attention(q, k, v, True, segments, segments, 0, reach, cap or None)
    np.testing.assert_allclose(out, expected, atol=2e-6)


SINKS = np.array([-2.0, 0.0, 1.5, 30.0])


@pytest.mark.parametrize("kernel", KERNELS)
def test_sinks_take_part_of_the_softmax(kernel):
    q, k, v = make_inputs(130, 2)
    segments = make_segments(130)
    visibility = AttentionMask(True, jnp.asarray(segments))
    inputs = as_float32(q, k, v, SINKS)

    def attend(q, k, v, sinks, kernel):
        return attention(q, k, v, visibility, kernel, sinks_H=sinks)

    out = jax.jit(attend, static_argnums=4)(*inputs, kernel)
    expected = naive_attention(q, k, v, True, segments, segments, 0, sinks=SINKS)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    if kernel == "tiled":
        gradient = jax.jit(
            jax.grad(lambda *x: (attend(*x) ** 2).sum(), (0, 1, 2, 3)), static_argnums=4
        )
        for ours, plain in zip(gradient(*inputs, kernel), gradient(*inputs, "xla"), strict=True):
            np.testing.assert_allclose(ours, plain, atol=2e-5 * abs(plain).max())


def test_chunks_match_each_text():
    """Llama 4: a query sees the keys from the start of its chunk on, counted from its text's."""
    q, k, v = make_inputs(33, 2)
    segments = make_segments(33)
    starts = np.array([[list(row).index(s) for s in row] for row in segments])
    positions = np.arange(33) - starts
    chunks = segments * 100 + positions // 4
    visibility = AttentionMask(
        True, jnp.asarray(segments), window=4, window_BL=jnp.asarray(positions % 4 + 1)
    )
    out = run(*as_float32(q, k, v), visibility)
    expected = naive_attention(q, k, v, True, chunks, chunks, 0)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    everything = run(*as_float32(q, k, v), visibility.replace(is_global=jnp.asarray(True)))
    expected = naive_attention(q, k, v, True, segments, segments, 0)
    np.testing.assert_allclose(everything, expected, atol=2e-6)


def test_tiled_kernel_rejects_what_it_cannot_do():
    q, k, v = as_float32(*make_inputs(4, 2))
    prefix = jnp.ones((2, 4), jnp.int32)
    unlike = (
        AttentionMask(False),
        AttentionMask(True, prefix_BS=prefix),
        AttentionMask(True, window=2),
    )
    for visibility in unlike:
        with pytest.raises(ValueError, match="plain causal"):
            attention(q, k, v, visibility, kernel="tiled")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("traced", [False, True])
def test_offset_shifts_queries_relative_to_keys(kernel, traced):
    q, k, v = make_inputs(3, 2, n_keys=12)
    key_segments = np.array([[0, 0] + [1] * 8 + [0, 0], [1] * 10 + [0, 0]])
    query_segments = np.ones((2, 3), int)
    offset = jnp.asarray(7) if traced else 7
    visibility = AttentionMask(True, jnp.asarray(query_segments), jnp.asarray(key_segments), offset)
    out = run(*as_float32(q, k, v), visibility, kernel=kernel)
    expected = naive_attention(q, k, v, True, query_segments, key_segments, 7)
    np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("segmented", [False, True])
def test_gradients_are_the_slopes_of_the_definition(kernel, segmented):
    length = 70
    q, k, v = make_inputs(length, 2, head_dim=4, batch=1)
    segments = make_segments(length, 1) if segmented else np.ones((1, length), int)
    rng = np.random.default_rng(0)
    cotangent = rng.normal(size=q.shape)
    visibility = AttentionMask(True, jnp.asarray(segments), jnp.asarray(segments))

    def loss(*qkv):
        return (attention(*qkv, visibility, kernel=kernel) * cotangent).sum()

    grads = jax.jit(jax.grad(loss, (0, 1, 2)))(*as_float32(q, k, v))
    for i, grad in enumerate(grads):
        direction = rng.normal(size=grad.shape)

        def moved(by, i=i, direction=direction):
            at = [x + by * direction if j == i else x for j, x in enumerate((q, k, v))]
            return (naive_attention(*at, True, segments, segments, 0) * cotangent).sum()

        slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
        assert float((grad * direction).sum()) == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize(("length", "n_kv_heads"), [(256, 4), (130, 1)])
def test_tiled_has_the_gradients_of_xla(segmented, length, n_kv_heads):
    qkv = as_float32(*make_inputs(length, n_kv_heads))
    segments = jnp.asarray(make_segments(length)) if segmented else None
    cotangent = np.random.default_rng(1).normal(size=qkv[0].shape).astype(np.float32)

    def gradients(kernel):
        visibility = AttentionMask(True, segments, segments)

        def loss(*qkv):
            return (attention(*qkv, visibility, kernel=kernel) * cotangent).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2)))(*qkv)

    for tiled, plain in zip(gradients("tiled"), gradients("xla"), strict=True):
        np.testing.assert_allclose(tiled, plain, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_query_without_visible_keys_gives_finite_values_and_gradients(kernel):
    qkv = as_float32(*make_inputs(32, 2))
    visibility = AttentionMask(True, jnp.ones((2, 32), int), jnp.zeros((2, 32), int))

    def loss(*qkv):
        return attention(*qkv, visibility, kernel=kernel).sum()

    value, grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*qkv)
    assert np.isfinite(value)
    assert all(np.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_in_bfloat16_out_with_float32_sums(kernel):
    q, k, v = make_inputs(100, 2)
    rounded = [x.astype(jnp.bfloat16) for x in as_float32(q, k, v)]
    out = run(*rounded, AttentionMask(True), kernel=kernel)
    assert out.dtype == jnp.bfloat16
    one = np.ones((2, 100), int)
    exact = naive_attention(*(np.asarray(x, np.float64) for x in rounded), True, one, one, 0)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.02)


@pytest.mark.parametrize("kernel", KERNELS)
def test_large_scores_do_not_overflow(kernel):
    q, k, v = make_inputs(32, 4)
    out = run(*as_float32(300 * q, 300 * k, v), AttentionMask(True), kernel=kernel)
    one = np.ones((2, 32), int)
    np.testing.assert_allclose(
        out, naive_attention(300 * q, 300 * k, v, True, one, one, 0), atol=1e-3
    )


def test_dropout_keeps_the_expectation_of_every_weight():
    n, rate = 32, 0.25
    q, k, _ = as_float32(*make_inputs(n, 1, n_heads=1, head_dim=n, batch=1))
    identity = jnp.eye(n)[None, :, None]  # as values: the output is the weights themselves

    def weights(key):
        dropout = None if key is None else Dropout(key, rate)
        return attention(q, k, identity, AttentionMask(True), dropout=dropout)[0, :, 0]

    clean = np.asarray(jax.jit(weights)(None))
    keys = jax.random.split(jax.random.key(0), 400)
    dropped = np.asarray(jax.jit(jax.vmap(weights))(keys))

    seen = np.tril(np.ones((n, n), bool))
    kept = dropped != 0
    assert not kept[:, ~seen].any()
    np.testing.assert_allclose(np.where(kept, dropped * (1 - rate), 0), kept * clean, atol=1e-6)
    # 400 draws of probability 0.75 lie within five deviations of their mean, for every weight.
    shares = kept.mean(0)[seen & (clean > 1e-6)]
    assert abs(shares - (1 - rate)).max() < 5 * np.sqrt(rate * (1 - rate) / 400)
    # Queries are dropped apart from one another: with p = 0.75, two agree in 62.5 % of keys.
    patterns = kept[:, n // 2 :, : n // 2]
    agreement = (patterns[:, :, None] == patterns[:, None]).mean((0, 3))
    assert agreement[~np.eye(n // 2, dtype=bool)].max() < 0.7


def test_dropout_is_a_function_of_its_key():
    qkv = as_float32(*make_inputs(32, 2))

    @jax.jit
    def out(key):
        return attention(*qkv, AttentionMask(True), dropout=Dropout(key, 0.5))

    one, again, other = (out(jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert abs(one - other).max() > 0.1


@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize("is_global", [None, False, True])
def test_bidirectional_window(window, is_global):
    """As ModernBERT's: half of the window on either side, within the query's document."""
    segments, places = make_segments(23), np.arange(23)
    mask = AttentionMask(False, segments, window=window, is_global=is_global)
    found = np.asarray(mask.materialize(23, 23))
    near = np.abs(places[:, None] - places) <= window // 2
    same = segments[:, :, None] == segments[:, None, :]
    np.testing.assert_array_equal(found, same & (near | bool(is_global)))
    start, end = (np.asarray(bound)[..., None] for bound in bounds_by_query(mask, 23, 23))
    np.testing.assert_array_equal(found, (places >= start) & (places < end))
