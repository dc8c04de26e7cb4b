"""Flash attention with dropout and position biases: a Pallas kernel for what no library fuses.

Besides masks, segments, prefixes, windows, soft caps and grouped heads, which splash and cuDNN
support in part, this kernel draws the dropout of attention weights itself, and adds a bias by
query–key distance (T5's buckets, ALiBi's slopes) from one vector per head, so nothing of size
[L, S] is in main memory (Dao et al. 2022, alg. 1 and 4). `flash_tiles.py` describes how.

Heads keep the layout of the projections, [B, L, H K]: a block is a group of heads that fills the
lanes, and no operand is transposed.

Shape letters: B batch, L queries, S keys, H heads, G key/value heads, K head dim, T queries of a
tile, C columns (keys of a tile), D distances, N blocks of heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.kernels.dot_product_attention import NEG_INF, AttentionMask
from lm.kernels.flash_tiles import (
    LANES,
    LARGEST_BLOCK,
    WHOLE_QUERIES,
    Arrays,
    Layout,
    Pair,
    dot,
    to_row,
)


def flash_attention(
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: AttentionMask,
    *,
    scale: float,
    softcap: float = 0.0,
    bias_HD: jax.Array | None = None,
    words_BHW: jax.Array | None = None,
    rate: float = 0.0,
    total_length: int = 0,
    interpret: bool = False,
) -> jax.Array:
    """Compute attention with scores, mask, bias and dropout in tiles on chip.

    Args:
        q_BLHK: queries.
        k_BSGK: keys.
        v_BSGK: values.
        mask: which keys each query attends to; `offset` is the index of the first query among the
            queries of all devices. A query without keys gets a finite value and no gradient.
        scale: factor of the scores.
        softcap: soft cap of the scores; 0: none.
        bias_HD: bias of the scores by distance (key - query), from 1 - total_length to S - 1.
        words_BHW: dropout key of each row and head, two uint32; None: no dropout.
        rate: dropout rate of the attention weights.
        total_length: number of queries of all devices; 0 if this device has all.
        interpret: run on any platform, slowly, for tests.

    Returns:
        Output [B, L, H, K]. Scores and softmax are computed in float32.
    """
    (B, L, H, K), (S, G) = q_BLHK.shape, k_BSGK.shape[1:3]
    layout = Layout(
        n_heads=H,
        n_kv_heads=G,
        head_dim=K,
        length=L,
        n_keys=S,
        total_length=total_length or L,
        causal=mask.causal,
        window=mask.window if mask.causal else 0,
        scale=scale,
        softcap=softcap,
        rate=0.0 if words_BHW is None else rate,
        interpret=interpret,
    )
    # Many query heads per key/value head would make blocks too wide: repeat keys and values.
    groups = (G * f for f in range(1, H // G + 1) if H // G % f == 0)
    layouts = (replace(layout, n_kv_heads=group) for group in groups)
    layout = next((c for c in layouts if c.head_block * K <= LARGEST_BLOCK // LANES), layout)
    k_BSGK, v_BSGK = (jnp.repeat(x, layout.n_kv_heads // G, axis=2) for x in (k_BSGK, v_BSGK))
    n = layout.head_block
    lengths = [count * size for count, size in zip(layout.n_tiles, layout.tile, strict=True)]
    arrays = {"q": q_BLHK.reshape(B, L, H * K)}
    arrays |= {"k": k_BSGK.reshape(B, S, -1), "v": v_BSGK.reshape(B, S, -1)}
    if mask.segments_BL is not None:
        keys_BS = mask.segments_BL if mask.key_segments_BS is None else mask.key_segments_BS
        arrays["segments"] = _row(mask.segments_BL, lengths[0])
        arrays["key_segments"] = _row(keys_BS, lengths[1])
    if mask.causal and mask.prefix_BS is not None:
        arrays["prefix"] = _row(mask.prefix_BS, lengths[1])
    if bias_HD is not None:
        before = layout.zero_distance - layout.total_length + 1
        after = layout.zero_distance + lengths[1] - bias_HD.shape[1] - before
        padded = jnp.pad(bias_HD.astype(jnp.float32), ((0, 0), (before, after)))
        arrays["bias"] = padded.reshape(layout.n_blocks, n, -1)
    window = jnp.asarray(layout.window)
    if mask.is_global is not None:
        window = jnp.where(mask.is_global, L + S + layout.total_length, window)
    # Scalars used by block index maps: first query, window, dropout keys.
    numbers = [jnp.asarray(mask.offset)[None], window[None]]
    if words_BHW is not None:
        numbers.append(jax.lax.bitcast_convert_type(words_BHW, jnp.int32).reshape(-1))
    arrays["numbers"] = jnp.concatenate([x.astype(jnp.int32) for x in numbers])
    return _attention(layout, arrays).reshape(B, L, H, K)


def _row(x_BL: jax.Array, length: int) -> jax.Array:
    """Reshape per-token integers to rows [B, 1, length], padded with -1."""
    x_BL = x_BL.astype(jnp.int32)
    return jnp.pad(x_BL, ((0, 0), (0, length - x_BL.shape[1])), constant_values=-1)[:, None]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(layout: Layout, arrays: Arrays) -> jax.Array:
    return _forward(layout, arrays)[0]


def _forward(layout: Layout, arrays: Arrays) -> tuple[jax.Array, Arrays]:
    q, T, n = arrays["q"], layout.tile[0], layout.head_block
    outputs = {"o": q, "log_z": jax.ShapeDtypeStruct(_statistic_shape(layout, q), jnp.float32)}
    scratch = [(T, n * layout.head_dim), (n, T, LANES), (n, T, LANES)]
    results = _call(layout, _forward_kernel, arrays, outputs, scratch, 2, keys_inner=True)
    return results["o"], arrays | results


def _backward(layout: Layout, residuals: Arrays, g: jax.Array) -> tuple[Arrays]:
    arrays = residuals | {"g": g}
    (T, C), K = layout.tile, layout.head_dim
    width, kv_width = layout.head_block * K, layout.kv_block * K
    n_queries = layout.n_tiles[0] * T
    of_keys = {"dk": arrays["k"], "dv": arrays["v"]}
    if "bias" in arrays:
        of_keys["dbias"] = arrays["bias"]
    key_scratch = [(C, kv_width), (C, kv_width)]
    call = partial(_call, layout, _backward_kernel, arrays)
    if n_queries * width <= WHOLE_QUERIES:
        outputs = {"dq": arrays["q"], **of_keys}
        grads = call(outputs, [*key_scratch, (n_queries, width)], 5, keys_inner=False)
    else:
        grads = call({"dq": arrays["q"]}, [(T, width)], 3, keys_inner=True)
        grads |= call(of_keys, key_scratch, 4, keys_inner=False)
    grads = {name.removeprefix("d"): grad for name, grad in grads.items()}
    inputs = residuals.keys() - {"o", "log_z"}
    return ({name: grads.get(name) for name in inputs},)


_attention.defvjp(_forward, _backward)


def _statistic_shape(layout: Layout, q: jax.Array) -> tuple[int, ...]:
    """Return the shape [B, N, heads of a block, L] of a per-query, per-head statistic."""
    return len(q), layout.n_blocks, layout.head_block, layout.n_tiles[0] * layout.tile[0]


def _call(
    layout: Layout,
    kernel: Callable[..., None],
    arrays: Arrays,
    outputs: Arrays,
    scratch: Sequence[tuple[int, ...]],
    n_products: int,
    keys_inner: bool,
) -> Arrays:
    """Run a kernel over blocks of heads, rows, and tiles of queries and keys.

    Args:
        layout: static part of the call.
        kernel: kernel body.
        arrays: operands by name; "numbers" are scalars.
        outputs: shapes and dtypes of the results by name.
        scratch: shapes of float32 accumulators.
        n_products: matrix products per pair of tiles.
        keys_inner: whether the innermost loop is over keys rather than queries.

    Returns:
        Results by name.
    """
    # Lazy: the import takes half a second.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (T, C), K, n = layout.tile, layout.head_dim, layout.head_block
    n_q, n_k = layout.n_tiles
    width, kv_width = n * K, layout.kv_block * K
    inputs = {name: x for name, x in arrays.items() if name != "numbers"}
    skips = layout.causal and "prefix" not in arrays

    shapes = {
        "query": (1, T, width),
        "key": (1, C, kv_width),
        "statistic": (1, 1, n, T),
        "query_row": (1, 1, T),
        "key_row": (1, 1, C),
        "queries": (1, n_q * T, width),
    }
    kinds = {
        **dict.fromkeys(("q", "o", "g"), "query"),
        **dict.fromkeys(("k", "v", "dk", "dv"), "key"),
        **{
            "log_z": "statistic",
            "segments": "query_row",
            "dq": "query" if keys_inner else "queries",
        },
        **dict.fromkeys(("key_segments", "prefix"), "key_row"),
        **dict.fromkeys(("bias", "dbias"), "bias"),
    }

    def specs(of: Arrays) -> Arrays:
        def spec(name: str, x: Any) -> Any:
            kind = kinds[name]
            block = shapes.get(kind, (1, *x.shape[1:]))
            return pl.BlockSpec(block, _index_map(layout, kind, keys_inner, skips))

        return {name: spec(name, x) for name, x in of.items()}

    pairs, B = layout.needed_pairs() * len(arrays["q"]), len(arrays["q"])
    size = arrays["q"].dtype.itemsize
    fetched = dict.fromkeys(("query", "key", "queries"), float(B))
    if keys_inner and n_k > 1:
        fetched["key"] = pairs / n_k
    if not keys_inner and n_q > 1:
        fetched["query"] = pairs / n_q
    moved = sum(
        fetched.get(kinds[name], B) * np.prod(x.shape[1:]) * size
        for name, x in (inputs | outputs).items()
        if kinds[name] in fetched
    )
    grid = (layout.n_blocks, B, *((n_q, n_k) if keys_inner else (n_k, n_q)))
    return pl.pallas_call(
        partial(kernel, layout, keys_inner),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[specs(inputs)],
            out_specs=specs(outputs),
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape={name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in outputs.items()},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=int(2 * n_products * pairs * T * C * K * layout.n_heads),
            bytes_accessed=int(moved),
            transcendentals=int(pairs * T * C * layout.n_heads),
        ),
        name=f"flash_attention{kernel.__name__.removesuffix('_kernel')}",
        interpret=layout.interpret,
    )(arrays["numbers"], inputs)


def _index_map(
    layout: Layout, of: str, keys_inner: bool, skips: bool
) -> Callable[..., tuple[Any, ...]]:
    """Return the index map from a grid step to a block of queries, keys or heads.

    Args:
        layout: static part of the call.
        of: kind of the block.
        keys_inner: whether the innermost loop is over keys rather than queries.
        skips: whether fully masked pairs of tiles are skipped.
    """
    (T, C), (n_q, n_k) = layout.tile, layout.n_tiles

    def block(h: Any, b: Any, outer: Any, inner: Any, numbers: Any) -> tuple[Any, ...]:
        i, j = (outer, inner) if keys_inner else (inner, outer)
        # Do not fetch a skipped tile: use the nearest needed one instead.
        if skips and keys_inner and n_k > 1:
            last = jax.lax.div(numbers[0] + i * T + T - 1, C)
            j = jnp.minimum(j, jnp.minimum(last, n_k - 1))
            if layout.window:
                first = jnp.maximum(numbers[0] + i * T - numbers[1] + 1, 0)
                j = jnp.maximum(j, jax.lax.div(first, C))
        elif skips and not keys_inner and n_q > 1:
            first = jax.lax.div(jnp.maximum(j * C - numbers[0], 0), T)
            i = jnp.maximum(i, jnp.minimum(first, n_q - 1))
        places = {
            "query": (b, i, h),
            "key": (b, j, h),
            "statistic": (b, h, 0, i),
            "query_row": (b, 0, i),
            "key_row": (b, 0, j),
            "bias": (h, 0, 0),
            "queries": (b, 0, h),
        }
        return places[of]

    return block


# --- kernel bodies


def _forward_kernel(
    layout: Layout, keys_inner: bool, numbers: Any, inputs: Arrays, outputs: Arrays, *scratch: Any
) -> None:
    from jax.experimental import pallas as pl

    acc, maxima, sums = scratch
    pair = Pair(layout, keys_inner, numbers, inputs)
    K = layout.head_dim

    @pl.when(pair.inner == 0)
    def start() -> None:
        acc[...] = jnp.zeros(acc.shape, acc.dtype)
        maxima[...] = jnp.full(maxima.shape, NEG_INF)
        sums[...] = jnp.zeros(sums.shape, sums.dtype)

    @pl.when(pair.is_needed)
    def step() -> None:
        mask = pair.mask()
        for h in range(layout.head_block):
            here = slice(h * K, (h + 1) * K)
            scores, _ = pair.scores(h, mask)
            before, largest = maxima[h, :, :1], scores.max(1, keepdims=True)
            largest = jnp.maximum(before, largest)
            weights, fade = jnp.exp(scores - largest), jnp.exp(before - largest)
            total = sums[h, :, :1] * fade + weights.sum(1, keepdims=True)
            if layout.rate:
                weights = jnp.where(pair.keep(h), weights, 0.0)
            v = pair.keys("v", h)
            acc[:, here] = acc[:, here] * fade + dot(weights.astype(v.dtype), v, 1, 0)
            maxima[h] = jnp.broadcast_to(largest, maxima.shape[1:])
            sums[h] = jnp.broadcast_to(total, sums.shape[1:])

    @pl.when(pair.inner == pl.num_programs(3) - 1)
    def end() -> None:
        for h in range(layout.head_block):
            here = slice(h * K, (h + 1) * K)
            total, largest = sums[h, :, :1], maxima[h, :, :1]
            factor = layout.keep_scale if layout.rate else 1.0
            out = acc[:, here] * (factor / total)
            outputs["o"][0, :, here] = out.astype(outputs["o"].dtype)
            log_z = jnp.where(largest > NEG_INF / 2, largest + jnp.log(total), jnp.inf)
            outputs["log_z"][0, 0, h : h + 1, :] = to_row(log_z)


def _backward_kernel(
    layout: Layout, keys_inner: bool, numbers: Any, inputs: Arrays, outputs: Arrays, *scratch: Any
) -> None:
    """Compute the gradients named in `outputs`: of queries, of keys and bias, or all."""
    from jax.experimental import pallas as pl

    pair = Pair(layout, keys_inner, numbers, inputs)
    (T, _), K = layout.tile, layout.head_dim
    dk_acc, dv_acc = scratch[:2] if "dk" in outputs else (None, None)
    dq_acc = scratch[-1] if "dq" in outputs else None
    first = pair.inner == 0
    queries = slice(None) if keys_inner else pl.ds(pair.i * T, T)

    @pl.when(first)
    def start() -> None:
        for acc in scratch[:2] if "dk" in outputs else scratch:
            acc[...] = jnp.zeros(acc.shape, acc.dtype)

    if dq_acc is not None and dk_acc is not None:

        @pl.when(pair.j == 0)
        def start_queries() -> None:
            dq_acc[queries, :] = jnp.zeros((T, dq_acc.shape[1]), dq_acc.dtype)

    if "dbias" in outputs:

        @pl.when(first & (pair.j == 0) & (pl.program_id(1) == 0))
        def start_bias() -> None:
            outputs["dbias"][...] = jnp.zeros(outputs["dbias"].shape, jnp.float32)

    @pl.when(pair.is_needed)
    def step() -> None:
        mask = pair.mask()
        for h in range(layout.head_block):
            here, kv_here = slice(h * K, (h + 1) * K), pair.kv_slice(h)
            scores, slope = pair.scores(h, mask)
            q, g, o = (pair.queries(name, h) for name in ("q", "g", "o"))
            k, v = pair.keys("k", h), pair.keys("v", h)
            delta = jnp.sum(g.astype(jnp.float32) * o.astype(jnp.float32), 1, keepdims=True)
            weights = jnp.exp(scores - pair.log_z(h))
            dweights = dot(g, v, 1, 1)
            kept = weights
            if layout.rate:
                keep = pair.keep(h)
                kept = jnp.where(keep, weights * layout.keep_scale, 0.0)
                dweights = jnp.where(keep, dweights * layout.keep_scale, 0.0)
            dscores = weights * (dweights - delta)
            if "dbias" in outputs:
                pair.add_bias_gradient(outputs["dbias"], h, dscores)
            if slope is not None:
                dscores *= slope
            dscores = dscores.astype(q.dtype)
            if dq_acc is not None:
                dq_acc[queries, here] += dot(dscores, k, 1, 0) * layout.scale
            if dk_acc is not None:
                dk_acc[:, kv_here] += dot(dscores, q, 0, 0)
                dv_acc[:, kv_here] += dot(kept.astype(g.dtype), g, 0, 0)

    @pl.when(pair.inner == pl.num_programs(3) - 1)
    def end() -> None:
        if dk_acc is not None:
            outputs["dk"][0] = dk_acc[...].astype(outputs["dk"].dtype)
            outputs["dv"][0] = dv_acc[...].astype(outputs["dv"].dtype)
        elif dq_acc is not None:
            outputs["dq"][0] = dq_acc[...].astype(outputs["dq"].dtype)

    if dq_acc is not None and dk_acc is not None:

        @pl.when(pair.j == pl.num_programs(2) - 1)
        def end_queries() -> None:
            outputs["dq"][0, queries, :] = dq_acc[queries, :].astype(outputs["dq"].dtype)
