"""Attention on GPUs with libraries: NVIDIA's cuDNN and Google's tokamax.

cuDNN supports causal masks and windows; other masks only as arrays. Tokamax supports a key range
per query; its forward pass skips key tiles before and after the range, its backward pass those
after a causal query. Its backward pass for Blackwell (0.0.12) is not used: it skips nothing,
compiles for minutes at 8192 tokens, and with head dim 128 key ranges do not fit into shared memory.
`triton_attention` is our own kernel for all other cases.

Shape letters: B batch, L queries, S keys, H heads, G key/value heads, K head dim.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import jax

from lm.kernels.dot_product_attention import AttentionMask
from lm.kernels.mask_ranges import bounds_by_query, most_pairs

TILE = 128  # lengths must be multiples of it: queries of a tile share a key range
# Largest head dim of cuDNN's backward pass by major compute capability, from its support matrix.
CUDNN_WIDEST_HEAD = {9: 256}
CUDNN_WIDEST_HEAD_ELSEWHERE = 128
HOPPER, TOKAMAX_WIDEST_HEAD = 9, 256
OLDEST = 8.0  # minimum compute capability for cuDNN's fused attention and Triton
TOKAMAX = "0.0.12"  # tested version; its operation and mask are private


def cudnn_attention(
    q_BLHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, mask: AttentionMask, scale: float
) -> jax.Array:
    """Run NVIDIA's fused kernel; segment and prefix masks become arrays [B, L, S].

    Args:
        q_BLHK: queries.
        k_BSGK: keys.
        v_BSGK: values.
        mask: which keys each query attends to.
        scale: factor of the scores.

    Returns:
        Output [B, L, H, K].
    """
    length, n_keys = q_BLHK.shape[1], k_BSGK.shape[1]
    options: dict[str, Any] = {}
    n_pairs = length * n_keys
    if cudnn_takes_arrays(mask):
        mask_BLS = mask.materialize(length, n_keys)
        assert mask_BLS is not None
        options["mask"] = mask_BLS[:, None]
    else:
        n_pairs = most_pairs(mask, length, n_keys)
        options["is_causal"] = mask.causal
        if mask.window:
            options["local_window_size"] = (mask.window - 1, 0)
    with jax.named_scope(f"attention_pairs_{n_pairs}"):
        return jax.nn.dot_product_attention(
            q_BLHK, k_BSGK, v_BSGK, scale=scale, implementation="cudnn", **options
        )


def cudnn_takes_arrays(mask: AttentionMask) -> bool:
    """Return whether cuDNN needs this mask as an array of all pairs."""
    return mask.segments_BL is not None or mask.prefix_BS is not None


def tokamax_attention(
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: AttentionMask,
    scale: float,
    softcap: float = 0.0,
) -> jax.Array:
    """Run tokamax's kernel for Hopper GPUs (Mosaic).

    Args:
        q_BLHK: queries; L is a multiple of TILE.
        k_BSGK: keys; S is a multiple of TILE.
        v_BSGK: values.
        mask: which keys each query attends to.
        scale: factor of the scores.
        softcap: soft cap of the scores; 0: none.

    Returns:
        Output [B, L, H, K].
    """
    length, n_keys = q_BLHK.shape[1], k_BSGK.shape[1]
    with jax.named_scope(f"attention_pairs_{most_pairs(mask, length, n_keys)}"):
        return _tokamax_kernel()(
            q_BLHK,
            k_BSGK,
            v_BSGK,
            mask=_tokamax_mask(mask, length, n_keys),
            logits_scale=scale,
            logits_soft_cap=softcap or None,
        )


def _tokamax_mask(mask: AttentionMask, length: int, n_keys: int) -> Any:
    """Convert a mask to tokamax's format; its causal flag also skips tiles in the backward pass."""
    from tokamax._src.ops.attention.base import Mask

    is_causal = mask.causal and mask.prefix_BS is None
    start, end = (bound[:, None] for bound in bounds_by_query(mask, length, n_keys))
    has_segments = mask.segments_BL is not None
    return Mask(
        k_start=start if has_segments or mask.window else None,
        k_end=end if (has_segments or mask.window) and not is_causal else None,
        is_causal=is_causal,
    )


def _tokamax_kernel() -> Any:
    """Return tokamax's operation, which chooses tiles by the default device."""
    from absl import flags
    from tokamax._src.ops.attention import pallas_mosaic_gpu as mosaic

    if not flags.FLAGS.is_parsed():  # otherwise it would parse the command line
        flags.FLAGS.mark_as_parsed()
    logging.getLogger("absl").addFilter(_is_no_cache_miss)
    return mosaic.PallasMosaicGpuFlashAttention()


def _is_no_cache_miss(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Autotuning cache miss")


def capability_problem(capability: str) -> str:
    """Return why no fused kernel can run on a GPU, or "".

    Args:
        capability: compute capability of the GPU (a name for AMD); "": unknown.
    """
    if capability and not (capability[0].isdigit() and float(capability) >= OLDEST):
        return f"GPUs of compute capability {capability}, only with NVIDIA's {OLDEST} or newer"
    return ""


def gpu_library_problems(kernel: str, head_dim: int, capability: str) -> Iterator[str]:
    """Yield reasons why "cudnn" or "tokamax" cannot run on a GPU.

    Args:
        kernel: name of the kernel.
        head_dim: head dim K.
        capability: compute capability of the GPU; "": unknown, treated as Hopper.
    """
    major = int(float(capability or HOPPER))
    if kernel == "tokamax":
        if problem := tokamax_problem():
            yield problem
        if major != HOPPER:
            yield f"GPUs of compute capability {capability}, only with Hopper's, 9.0"
    widest = TOKAMAX_WIDEST_HEAD
    if kernel == "cudnn":
        widest = CUDNN_WIDEST_HEAD.get(major, CUDNN_WIDEST_HEAD_ELSEWHERE)
    if head_dim % 8 or head_dim > widest:
        yield f"--config.model.head_dim={head_dim} (a multiple of 8 up to {widest})"


def tokamax_problem() -> str:
    """Return the installed tokamax if it is not the tested version, or ""."""
    try:
        installed = metadata.version("tokamax")
    except metadata.PackageNotFoundError:
        installed = "no"
    return "" if installed == TOKAMAX else f"{installed} tokamax (pip install tokamax=={TOKAMAX})"
