"""Attention on a mesh.

The compiler partitions the "xla" kernel; others run on each device's rows and heads
(`shard_map`). Where the length is sharded over `context`, keys and values are gathered, or passed
on in a ring. `attend` in `attention.py` handles the cases that need none of this.

Shape letters: B batch, L queries, S keys, H heads, G key/value heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import lcm
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from ml_collections import ConfigDict

from lm.config.registries import MIXERS, OBJECTIVES
from lm.config.rules import POSITION_BIASES
from lm.kernels.blockwise_attention import BlockwiseTiles, blockwise_attention, count_tiles
from lm.kernels.dot_product_attention import AttentionMask, Dropout, attention
from lm.kernels.ring_attention import from_zigzag, keys_before, ring_attention, to_zigzag
from lm.kernels.splash_attention import (
    LANES,
    SplashTiles,
    largest_block,
    make_splash_kernel,
    splash_attention,
)
from lm.parallel.mesh import LENGTH_AXIS, activation_sharding, constrain, count_shards, current_mesh

QUERIES = ("batch", "length", "heads", "head_dim")
KEYS = ("batch", "keys", "heads", "head_dim")


def attend_on_mesh(
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: AttentionMask,
    *,
    kernel: str,
    context_attention: str,
    scale: float,
    softcap: float = 0.0,
    bias_HLS: jax.Array | None = None,
    sinks_H: jax.Array | None = None,
    dropout: Dropout | None = None,
) -> jax.Array:
    """Compute attention, each device on its shard of queries and keys.

    Args:
        q_BLHK: queries.
        k_BSGK: keys.
        v_BSGK: values.
        mask: visible keys.
        kernel: name of the kernel.
        context_attention: "ring" or "gather".
        scale: factor of the scores.
        softcap: cap of the scores (softcap · tanh); 0: none.
        bias_HLS: position bias of the scores; for the kernel "flash" by distance, [H, L + S - 1].
        sinks_H: logits of the attention sinks.
        dropout: dropout of the attention weights.

    Returns:
        [B, L, H, K].

    Raises:
        ValueError: the kernel does not support the options.
    """
    is_self = mask.key_segments_BS is None and q_BLHK.shape[1] == k_BSGK.shape[1]
    is_cut = count_shards("length") > 1
    ring = is_cut and context_attention == "ring" and is_self
    if kernel == "xla" and not ring:
        names = ("batch", "keys", "kv_heads", "head_dim")
        k_BSGK, v_BSGK = (constrain(x, *names) for x in (k_BSGK, v_BSGK))
        more: Any = {"softcap": softcap, "bias_HLS": bias_HLS, "sinks_H": sinks_H}
        more |= {"dropout": dropout}
        return attention(q_BLHK, k_BSGK, v_BSGK, mask, scale=scale, **more)
    if mask.window_BL is not None:
        mask = _chunks_as_segments(mask)
    if sinks_H is not None and kernel not in WITH_SINKS:
        raise ValueError(f'attention kernel "{kernel}" has no sinks')
    if kernel == "flash" and not ring:
        keys_values = _for_every_shard(k_BSGK), _for_every_shard(v_BSGK)
        return _flash(q_BLHK, *keys_values, mask, scale, softcap, bias_HLS, dropout)
    if not (bias_HLS is None and dropout is None):
        raise ValueError(f'attention kernel "{kernel}" has neither bias nor dropout')
    if softcap and kernel == "cudnn":
        raise ValueError('attention kernel "cudnn" has no soft-cap')
    k_BSGK, v_BSGK = _for_every_shard(k_BSGK), _for_every_shard(v_BSGK)
    run = _across if ring else _splash if kernel == "splash" else _by_rows_and_heads
    layer = partial(run, kernel=kernel, scale=scale, softcap=softcap, sinks_H=sinks_H)
    return _by_window(layer, q_BLHK, k_BSGK, v_BSGK, mask)


def _chunks_as_segments(mask: AttentionMask) -> AttentionMask:
    """Return the mask of chunked self-attention as causal attention within segments.

    Each chunk is a segment: its tokens have the position of its first token as their segment id.
    """
    assert mask.window_BL is not None
    assert mask.key_segments_BS is None
    chunks_BL = jnp.arange(mask.window_BL.shape[1]) - mask.window_BL + 1
    if mask.is_global is not None:
        texts_BL = jnp.zeros_like(chunks_BL) if mask.segments_BL is None else mask.segments_BL
        chunks_BL = jnp.where(mask.is_global, texts_BL, chunks_BL)
    return replace(mask, segments_BL=chunks_BL, window=0, window_BL=None, is_global=None)


def _by_window(
    attend: Callable[..., jax.Array],
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: AttentionMask,
) -> jax.Array:
    """Run the kernel for a local or a global layer.

    A kernel's tiles are chosen at compile time, so layers with and without a window need different
    kernels, and `mask.is_global` selects between the two.
    """

    def with_window(window: int) -> Callable[..., jax.Array]:
        own_mask = replace(mask, window=window, is_global=None)
        return lambda q, k, v: attend(q, k, v, own_mask)

    here = with_window(mask.window if mask.window < k_BSGK.shape[1] else 0)
    if mask.is_global is None:
        return here(q_BLHK, k_BSGK, v_BSGK)
    return lax.cond(mask.is_global, with_window(0), here, q_BLHK, k_BSGK, v_BSGK)


def _for_every_shard(x_BSGK: jax.Array) -> jax.Array:
    """Repeat key/value heads until the mesh can shard them like the query heads."""
    G, shards = x_BSGK.shape[2], count_shards("heads")
    return jnp.repeat(x_BSGK, lcm(G, shards) // G, axis=2)


def _by_rows_and_heads(
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: AttentionMask,
    kernel: str,
    scale: float,
    softcap: float,
    sinks_H: jax.Array | None,
) -> jax.Array:
    def local(q: Any, k: Any, v: Any, arrays: Any, sinks: Any) -> jax.Array:
        segments, key_segments, prefix = arrays
        own_mask = replace(
            mask, segments_BL=segments, key_segments_BS=key_segments, prefix_BS=prefix
        )
        inputs = (q, k, v, own_mask, scale)
        if kernel == "blockwise":
            return blockwise_attention(*inputs, softcap, sinks)
        if kernel == "triton":
            from lm.kernels.triton_attention import triton_attention

            return triton_attention(*inputs, softcap, sinks)
        from lm.kernels.gpu_attention import cudnn_attention, tokamax_attention

        if kernel == "cudnn":
            return cudnn_attention(*inputs)
        return tokamax_attention(*inputs, softcap)

    # If the length is sharded, these are the keys of another sequence.
    rows, keys = (activation_sharding("batch", name).spec for name in ("length", "keys"))
    arrays = [mask.segments_BL, mask.key_segments_BS, mask.prefix_BS]
    arguments = (q_BLHK, k_BSGK, v_BSGK, arrays, sinks_H)
    return _shard_mapped(local, arguments, (QUERIES, KEYS, KEYS, [rows, keys, keys], ("heads",)))


def _flash(
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: AttentionMask,
    scale: float,
    softcap: float,
    bias_HD: jax.Array | None,
    dropout: Dropout | None,
) -> jax.Array:
    from lm.kernels.flash_attention import flash_attention

    (B, L, H, _), parts = q_BLHK.shape, count_shards("length")
    words_BHW = None if dropout is None else jax.random.bits(dropout.key, (B, H, 2), "uint32")
    options: Any = {"scale": scale, "softcap": softcap, "total_length": L}
    options["rate"] = dropout.rate if dropout else 0.0

    def local(q: Any, k: Any, v: Any, own: Any, keys: Any, first: Any, *more: Any) -> jax.Array:
        prefix_BS, is_global, bias_HD, words_BHW = more
        shown = replace(
            mask,
            segments_BL=own,
            key_segments_BS=keys,
            offset=first[0],
            prefix_BS=prefix_BS,
            is_global=is_global,
        )
        arrays: Any = {"bias_HD": bias_HD, "words_BHW": words_BHW}
        return flash_attention(q, k, v, shown, **arrays, **options)

    key_segments_BS = mask.segments_BL if mask.key_segments_BS is None else mask.key_segments_BS
    arguments = (
        *(q_BLHK, k_BSGK, v_BSGK, mask.segments_BL, key_segments_BS),
        *(jnp.arange(parts) * (L // parts), mask.prefix_BS, mask.is_global, bias_HD, words_BHW),
    )
    keys, heads = ("batch", "keys"), ("heads", "positions")
    rows = (("batch", "length"), keys, ("length",), keys, (), heads, ("batch", "heads"))
    return _shard_mapped(local, arguments, (QUERIES, KEYS, KEYS, *rows))


def _across(
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: AttentionMask,
    kernel: str,
    scale: float,
    softcap: float,
    sinks_H: jax.Array | None,
) -> jax.Array:
    """Run self-attention of a sharded sequence, as a ring or from the shards in the window."""
    by_splash = kernel == "splash"
    if mask.prefix_BS is not None and mask.window:
        raise ValueError("across parts of the sequence, attention has prefixes or windows")

    def ring(q: Any, k: Any, v: Any, *arrays: Any) -> jax.Array:
        causal, tiles = mask.causal, _ring_tiles(kernel, softcap)
        return ring_attention(q, k, v, *arrays, causal=causal, axis=LENGTH_AXIS, tiles=tiles)

    def local(q: Any, k: Any, v: Any, ids: Any, _: Any, sinks: Any) -> jax.Array:
        L, reach = q.shape[1], mask.window - 1
        unit = largest_block(L) if by_splash else 1
        n = min(-(-reach // unit) * unit, k_BSGK.shape[1] - L)
        k, v, key_ids = keys_before(k, v, ids, n, LENGTH_AXIS)
        ids = key_ids[:, n:]
        if not by_splash:
            own_mask = AttentionMask(True, ids, key_ids, n, window=mask.window)
            return blockwise_attention(q, k, v, own_mask, 1.0, softcap, sinks)
        sizes = q.shape[2], L, L + n
        kernel = make_splash_kernel(
            *sizes, causal=True, window=mask.window, offset=n, softcap=softcap
        )
        return splash_attention(kernel, q, k, v, ids, key_ids, sinks)

    q_BLHK = q_BLHK * jnp.asarray(scale, q_BLHK.dtype)
    arguments = (q_BLHK, k_BSGK, v_BSGK, mask.segments_BL, mask.prefix_BS, sinks_H)
    rows = ("batch", "length")
    names = (QUERIES, QUERIES, QUERIES, rows, rows, ("heads",))
    return _shard_mapped(local if mask.window else ring, arguments, names)


def _ring_tiles(kernel: str, softcap: float) -> Any:
    """Return the tile computation for the steps of a ring."""
    if kernel == "cudnn":
        from lm.kernels.cudnn_tiles import CudnnTiles

        return CudnnTiles()
    return SplashTiles(softcap) if kernel == "splash" else BlockwiseTiles(softcap)


def _splash(
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: AttentionMask,
    kernel: str,
    scale: float,
    softcap: float,
    sinks_H: jax.Array | None,
) -> jax.Array:
    if mask.prefix_BS is not None:
        raise ValueError('attention kernel "splash" has no prefixes')
    causal, axis, shards = mask.causal, LENGTH_AXIS, count_shards("length")
    zigzag = causal and shards > 1
    # Without a causal mask, every query shard runs the same kernel.
    is_sharded = causal or mask.window
    splash = make_splash_kernel(
        q_BLHK.shape[2],
        q_BLHK.shape[1] // (1 if is_sharded else shards),
        k_BSGK.shape[1],
        causal=causal,
        window=mask.window,
        softcap=softcap,
        head_shards=count_shards("heads"),
        query_shards=shards if is_sharded else 1,
    )

    def local(q: Any, k: Any, v: Any, segments: Any, *arrays: Any) -> jax.Array:
        key_segments, sinks, splash = arrays
        if zigzag:
            q, segments = jax.tree.map(lambda x: to_zigzag(x, axis), (q, segments))
        out = splash_attention(splash, q, k, v, segments, key_segments, sinks)
        return from_zigzag(out, axis) if zigzag else out

    q_BLHK = q_BLHK * jnp.asarray(scale, q_BLHK.dtype)
    segments_BL, key_segments_BS = mask.segments_BL, mask.key_segments_BS
    if key_segments_BS is None:
        key_segments_BS = segments_BL
    arguments = (q_BLHK, k_BSGK, v_BSGK, segments_BL, key_segments_BS, sinks_H, splash)
    of_queries = activation_sharding("heads", "length" if is_sharded else "keys")
    of_kernel = splash.manual_sharding_spec(of_queries)
    rows, keys, heads = ("batch", "length"), ("batch", "keys"), ("heads",)
    names = (QUERIES, KEYS, KEYS, rows, keys, heads, of_kernel)
    return _shard_mapped(local, arguments, names)


def _shard_mapped(
    function: Callable[..., jax.Array], arguments: Sequence[Any], names: Sequence[Any]
) -> jax.Array:
    """Apply a function under `jax.shard_map`, inside `use_mesh`.

    Used for kernels that the compiler cannot partition, and for those with their own collectives.

    Args:
        function: called by every device on its own shards of the arguments.
        arguments: pytrees of arrays.
        names: for each argument the logical names of its axes, or a tree of PartitionSpecs.

    Returns:
        The result of the function, sharded like the first argument.
    """
    specs = [activation_sharding(*n).spec if isinstance(n, tuple) else n for n in names]
    # The check of varying axes (check_vma) supports neither custom gradients nor Pallas.
    return jax.shard_map(
        function,
        mesh=current_mesh(),
        in_specs=tuple(specs),
        out_specs=specs[0],
        check_vma=False,
    )(*arguments)


# --- validation

GPU_KERNELS = ("cudnn", "tokamax", "triton")
WITH_SINKS = ("xla", "blockwise", "splash", "triton")
BOTH_SIDED = ("xla", "splash", "tokamax", "triton")  # support windows on both sides of a query


def kernel_problems(
    kernel: str, ring: bool, config: ConfigDict, context: int, capability: str = ""
) -> Iterator[str]:
    """Yield the settings that prevent a kernel, or the ring, from running.

    Args:
        kernel: "blockwise", "cudnn", "flash", "splash", "tokamax", "triton", or any with the
            ring.
        ring: keys and values are passed on in a ring.
        config: valid configuration with its defaults filled in.
        context: number of shards of the sequence.
        capability: compute capability of a GPU; "": unknown.
    """
    model, objective = config.model, OBJECTIVES[config.objective.name]
    of_gpu = kernel in GPU_KERNELS
    if context > 1 and (of_gpu or kernel == "blockwise") and not ring:
        yield "--config.parallel.context_attention=gather"
    if model.window and model.family == "encoder" and (ring or kernel not in BOTH_SIDED):
        yield _ring_or(ring, f"--config.model.window={model.window} of an encoder")
    if ring and kernel in ("flash", "tokamax", "triton"):
        yield "--config.parallel.context_attention=ring"
    if ring and kernel == "cudnn":
        if model.window:
            yield _ring_or(ring, f"--config.model.window={model.window}")
        if model.family != "decoder" or objective.has_prefix:
            yield _ring_or(ring, f"--config.model.family={model.family} (all pairs of tokens)")
    if model.attention_dropout and kernel != "flash":
        yield _ring_or(ring, f"--config.model.attention_dropout={model.attention_dropout}")
    by_distance = kernel == "flash" and model.positions != "disentangled"
    if model.positions in POSITION_BIASES and not by_distance:
        yield _ring_or(ring, f"--config.model.positions={model.positions}")
    if model.attention_sinks and kernel not in WITH_SINKS:
        yield _ring_or(ring, "--config.model.attention_sinks=True")
    if model.attention_softcap and kernel == "cudnn":
        yield f"--config.model.attention_softcap={model.attention_softcap}"
    if objective.has_prefix and (kernel in ("blockwise", "splash") and not ring):
        yield f"--config.objective.name={config.objective.name}"
    if objective.has_prefix and ring and model.window:
        yield _ring_or(ring, f"--config.model.window={model.window}")
    lengths = objective.attention_lengths(config)
    if of_gpu:
        yield from _gpu_problems(kernel, ring, config, lengths, capability)
    for name, length in lengths.items():
        if ring and length % (2 * context):
            yield f"--config.parallel.context_attention=ring and {name} ({length} tokens)"
        # Splash shards queries in zig-zag order, the flash kernel in multiples of whole tiles.
        parts = LANES * context if context > 1 else 1
        parts *= {"splash": 2 if context > 1 else LANES}.get(kernel, 1)
        if kernel in ("flash", "splash") and length % parts:
            yield f"{name}: {length} tokens, not a multiple of {parts}"
        if kernel == "blockwise" and not count_tiles(length // context):
            yield f"{name}: {length} tokens, which has no divisor between 64 and 512"


def _gpu_problems(
    kernel: str, ring: bool, config: ConfigDict, lengths: Mapping[str, int], capability: str
) -> Iterator[str]:
    """Yield what prevents a kernel from running on a GPU, or makes cuDNN a bad choice there."""
    from lm.kernels.gpu_attention import TILE, capability_problem, gpu_library_problems
    from lm.kernels.triton_attention import WIDEST_HEAD

    model = config.model
    head_dim = max(MIXERS[model.mixer].head_widths(model))
    if problem := capability_problem(capability):
        yield problem
    if model.dtype != "bfloat16":
        yield f"--config.model.dtype={model.dtype}"
    if kernel == "triton":
        if head_dim > WIDEST_HEAD:
            yield f"--config.model.head_dim={head_dim} (up to {WIDEST_HEAD})"
    else:
        yield from gpu_library_problems(kernel, head_dim, capability)
    # An explicit "cudnn" passes them as a mask array over all pairs; a ring passes lengths.
    if kernel == "cudnn" and model.attention == "auto" and not ring and _has_segments(config):
        yield "several texts or padding in a row"
    for name, length in lengths.items() if kernel == "tokamax" else ():
        if model.attention == "auto" and 0 < 4 * model.window <= length:
            yield (
                f"--config.model.window={model.window} (its backward pass computes all {length} "
                "tokens)"
            )
        if length % TILE:
            yield f"{name}: {length} tokens, not a multiple of {TILE}"


def _has_segments(config: ConfigDict) -> bool:
    """Return whether rows have several segments or padding: all but plain language models do.

    Chunked attention computes each chunk as a segment.
    """
    model = config.model
    longest = max(OBJECTIVES[config.objective.name].attention_lengths(config).values(), default=0)
    has_chunks = model.window_chunks and longest > model.window
    return config.objective.name != "causal" or config.data.isolate_documents or has_chunks


def _ring_or(ring: bool, problem: str) -> str:
    return f"--config.parallel.context_attention=ring and {problem}" if ring else problem
