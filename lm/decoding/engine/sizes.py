"""Sizes of a paged engine: rows, context, and number of pages that fit into memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any

import jax

from lm.decoding.engine.requests import GenerationRequest
from lm.decoding.prompts import context_length
from lm.errors import UserError
from lm.experiment import Experiment
from lm.models.layer_pages import Pages, empty_pages, page_kernel_problems
from lm.models.paged_cache import PAGED_MIXERS
from lm.models.transformer_config import TransformerConfig

_OF_MEMORY = 0.85  # fraction of a device's free memory used for pages


@dataclass(frozen=True)
class EngineOptions:
    """Sizes of an engine.

    Attributes:
        n_rows: maximum number of concurrent requests.
        context: maximum tokens of a prompt and its reply; 0: the model's context length.
        page_size: tokens per page.
        n_pages: pages of the cache; 0: enough for all rows, as far as memory allows.
        chunk: maximum prompt tokens per step, a multiple of the page size.
        steps_per_dispatch: steps per dispatch, each with at least one new token per row.
        n_proposed: proposed tokens per step for speculative decoding; 0: none.
    """

    n_rows: int = 32
    context: int = 0
    page_size: int = 32
    n_pages: int = 0
    chunk: int = 256
    steps_per_dispatch: int = 4
    n_proposed: int = 0


def is_pageable(experiment: Experiment) -> bool:
    """Return whether all layers cache only keys and values, so that pages can hold them."""
    config: Any = experiment.model.config  # type: ignore[attr-defined]
    if not isinstance(config, TransformerConfig) or not hasattr(experiment.model, "empty_cache"):
        return False
    mixers = {layer.mixer for layer in config.layer_types(config.n_layers)}
    is_one = len(mixers) == 1 and mixers.issubset(PAGED_MIXERS)
    return is_one and experiment.mesh.shape["stage"] == 1


def engine_kernel_problems(experiment: Experiment) -> Iterator[str]:
    """Yield reasons why the TPU kernel cannot read the engine's pages, as after "used with".

    Args:
        experiment: experiment on a mesh, prepared for decoding.
    """
    config: Any = experiment.model.config  # type: ignore[attr-defined]
    return page_kernel_problems(config, experiment.mesh, experiment.objective.has_prefix)


def reads_whole(experiment: Experiment) -> bool:
    """Return whether a prompt must be a single chunk, because its states depend on all of it."""
    config: Any = experiment.model.config  # type: ignore[attr-defined]
    return experiment.objective.has_prefix or config.rope_scaling in ("dynamic", "longrope")


def choose_context(experiment: Experiment, options: EngineOptions) -> int:
    """Return the maximum tokens of a prompt and its reply.

    Raises:
        UserError: the model has fewer positions, or the context is below two tokens.
    """
    config, most = experiment.config, context_length(experiment.model)
    if most is not None and options.context > most:
        raise UserError(f"--context {options.context} exceeds the model's {most} positions")
    context = options.context or int(config.model.max_length or config.data.sequence_length)
    if context < 2:
        raise UserError(f"a context of {context} token is too short for a prompt and a reply")
    return context


def chunk_lengths(options: EngineOptions) -> list[int]:
    """Return the padded lengths of prompt chunks: few, to limit compiled programs."""
    lengths = [options.page_size]
    while lengths[-1] * 2 < options.chunk:
        lengths.append(lengths[-1] * 2)
    return [*lengths, options.chunk]


def batch_sizes(n_rows: int) -> list[int]:
    """Return the padded batch sizes: 1, 2, 4, 8, 12, 16, 24, 32, …."""
    powers = [1 << i for i in range(n_rows.bit_length())]
    sizes = sorted([*powers, *[n * 3 // 2 for n in powers if n >= 8]])
    return [*[n for n in sizes if n < n_rows], n_rows]


def padded_chunk(options: EngineOptions, n: int) -> int:
    """Return the padded length of a chunk of n tokens; whole prompts may be longer."""
    length = next((x for x in chunk_lengths(options) if x >= n), options.chunk)
    while length < n:
        length *= 2
    return length


def longest_chunk(experiment: Experiment, options: EngineOptions) -> int:
    """Return the padded length of the longest prompt chunk."""
    longest = choose_context(experiment, options) - 1
    return padded_chunk(
        options, longest if reads_whole(experiment) else min(longest, options.chunk)
    )


def warm_up_requests(options: EngineOptions, context: int) -> list[GenerationRequest]:
    """Return requests that use each compiled program of an engine once.

    Prompts of each chunk length; and as many replies as there are rows, starting one after the
    other, so that every batch size occurs.

    Args:
        options: sizes of the engine.
        context: maximum tokens of a prompt and its reply.
    """
    lengths = [min(length, context - 1) for length in chunk_lengths(options)]
    most = min(options.n_rows + 1, context - 1)
    # Their first tokens differ, so that no prompt reuses the pages of another.
    prompts = [GenerationRequest((i,) * n, 1) for i, n in enumerate(lengths)]
    return [*prompts, *[GenerationRequest((len(lengths),), most)] * options.n_rows]


def pages_per_row(experiment: Experiment, options: EngineOptions) -> int:
    """Return the number of pages for a full context."""
    return ceil(choose_context(experiment, options) / options.page_size)


def make_pages(experiment: Experiment, n_pages: int, page_size: int) -> Pages:
    """Return empty pages of all layers.

    Args:
        experiment: experiment on a mesh, prepared for decoding.
        n_pages: number of pages.
        page_size: tokens per page.
    """
    config: Any = experiment.model.config  # type: ignore[attr-defined]
    has_prefix = experiment.objective.has_prefix
    return empty_pages(config, n_pages, page_size, experiment.mesh, has_prefix)


def page_bytes(experiment: Experiment, options: EngineOptions) -> int:
    """Return the bytes per page over all layers on a device.

    Args:
        experiment: experiment on a mesh, prepared for decoding.
        options: sizes.
    """
    one = jax.eval_shape(partial(make_pages, experiment, 1, options.page_size))
    return sum(layer.bytes_of_device(experiment.mesh) for layer in one)


def count_pages(
    experiment: Experiment,
    options: EngineOptions,
    free: int | None,
    draft: Experiment | None = None,
) -> int:
    """Return the number of pages: enough for one row at least, for all rows at most.

    Args:
        experiment: experiment on a mesh, prepared for decoding.
        options: sizes.
        free: free bytes of a device besides the parameters; None if unknown.
        draft: draft model, prepared for decoding, which needs as many pages of its own; or None.
    """
    if options.n_pages:
        return options.n_pages
    of_row = pages_per_row(experiment, options)
    most = all_rows = options.n_rows * of_row
    if free is not None:
        of_page = sum(page_bytes(one, options) for one in (experiment, draft) if one is not None)
        most = int(free * _OF_MEMORY) // of_page
    return max(of_row, min(all_rows, most))


def free_memory(device: jax.Device) -> int | None:
    """Return the free bytes of a device (CPU: half of the machine's memory); None if unknown."""
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None
