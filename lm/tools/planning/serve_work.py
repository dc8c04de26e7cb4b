"""FLOPs and bytes of one device in the paged engine, computed analytically.

A pass multiplies by every kernel on the device and reads it once; it reads next to nothing of
tables used only for look-ups. Tokens are spread evenly over experts. Attention reads every key
before a query, even in layers with a window, because the engine reads all pages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import ceil, prod
from typing import Any

import jax

from lm.accounting.flops import used_share
from lm.config.registries import MIXERS
from lm.decoding.engine.sizes import (
    EngineOptions,
    choose_context,
    longest_chunk,
    make_pages,
    page_bytes,
)
from lm.experiment import Experiment
from lm.models.parameter_groups import layer_numbers, layer_path
from lm.models.variables import KERNELS, Kind, Params, flat


@dataclass(frozen=True)
class Work:
    """FLOPs of matrix products and bytes read from main memory, of one device."""

    flops: float
    bytes: float


def shard_bytes(arrays: Any) -> int:
    """Return the bytes of one device's shards of arrays, or of shapes with shardings."""
    return sum(prod(_shard_shape(x)) * x.dtype.itemsize for x in jax.tree.leaves(arrays))


def work_of_step(
    experiment: Experiment, params: Params, options: EngineOptions, n_pages: int
) -> Work:
    """Return the work of a step that continues all rows, with every page full.

    Args:
        experiment: experiment on a mesh, prepared for decoding.
        params: shapes of its parameters with shardings.
        options: sizes.
        n_pages: number of pages.
    """
    R = options.n_rows
    n_cached = min(n_pages * options.page_size, R * choose_context(experiment, options))
    products = _pass(experiment, params, R, R)
    cache = n_cached * page_bytes(experiment, options) / options.page_size
    return Work(products.flops + _attention(experiment, n_cached), products.bytes + cache)


def work_of_prompt(
    experiment: Experiment, params: Params, options: EngineOptions
) -> Iterator[Work]:
    """Yield the work of each chunk of a prompt that leaves one token of the context.

    Args:
        experiment: see `work_of_step`.
        params: see `work_of_step`.
        options: sizes.
    """
    n_prompt = choose_context(experiment, options) - 1
    length = longest_chunk(experiment, options)
    for start in range(0, n_prompt, length):
        n = min(length, n_prompt - start)
        products = _pass(experiment, params, n, 1)
        pages = ceil((start + n) / options.page_size)
        yield Work(
            products.flops + _attention(experiment, n * start + n**2 / 2),
            products.bytes + pages * page_bytes(experiment, options),
        )


def _pass(experiment: Experiment, params: Params, n_tokens: int, n_logits: int) -> Work:
    """Return the work of tokens, some of which need logits, excluding attention."""
    flops = n_bytes = 0.0
    infos: dict[str, tuple[str, Any]] = {}
    for path, leaf in flat(experiment.inference_shapes).items():
        numbers = layer_numbers(path, leaf)
        stacked = numbers if numbers is not None and numbers.ndim else ()
        for own in (path, *(layer_path(path, n) for n in stacked)):
            infos[own] = path, experiment.param_infos.get(path)
    for path, x in flat(params).items():
        whole, info = infos[path]
        role = info.role if info else None
        share = used_share(experiment, whole) if role else 1.0
        is_looked_up = role and role.kind == Kind.EMBEDDING and not role.tied
        n_bytes += 0 if is_looked_up else shard_bytes(x) * (1 - (1 - share) ** n_tokens)
        if role and (role.kind in KERNELS or role.tied):
            first = jax.tree.leaves(x)[0]  # the integers of a quantized kernel
            n_own = prod(x.shape) * prod(_shard_shape(first)) / first.size
            has_logits = role.kind == Kind.HEAD or role.tied
            flops += 2 * share * n_own * (n_logits if has_logits else n_tokens)
    return Work(flops, n_bytes)


def _attention(experiment: Experiment, n_pairs: float) -> float:
    """Return the FLOPs of both attention products for a number of query–key pairs."""
    config: Any = experiment.model.config  # type: ignore[attr-defined]
    pages = jax.eval_shape(partial(make_pages, experiment, 1, 1))[0]
    of_all = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pages))
    n_heads = config.n_heads * pages.bytes_of_device(experiment.mesh) / of_all
    cache = jax.eval_shape(partial(MIXERS[config.mixer].init_cache, config, 1, 1, 1))
    width = jax.tree.leaves(cache)[0].shape[-1]  # head width in the cache
    return 4 * config.n_layers * n_heads * width * n_pairs


def _shard_shape(x: Any) -> tuple[int, ...]:
    return x.sharding.shard_shape(x.shape)  # type: ignore[no-any-return]
