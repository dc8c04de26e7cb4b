"""Sizes of a paged engine: rows, context, and pages that fit into memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any

import jax

from lm.decoding.engine.requests import GenerationRequest
from lm.decoding.prompts import context_length
from lm.errors import UserError
from lm.experiment import Experiment
from lm.models.paged_cache import ATTENTION, empty_pages
from lm.models.transformer_config import TransformerConfig

_OF_MEMORY = 0.85  # of a device's free memory, for pages


@dataclass(frozen=True)
class EngineOptions:
    """Sizes of an engine.

    Attributes:
        n_rows: most requests that run at once.
        context: most tokens of a prompt and its reply; 0: those that the model was made for.
        page_size: tokens of a page.
        n_pages: pages of the cache; 0: those that all rows can use, as far as memory allows.
        chunk: most tokens of a prompt that a step reads, a multiple of the page size.
        steps_per_dispatch: steps in one dispatch, each of at least one new token a row.
        n_proposed: tokens that speculative decoding proposes a step; 0: none.
    """

    n_rows: int = 32
    context: int = 0
    page_size: int = 32
    n_pages: int = 0
    chunk: int = 256
    steps_per_dispatch: int = 4
    n_proposed: int = 0


def is_pageable(experiment: Experiment) -> bool:
    """Return whether all layers cache keys and values alone, which pages can hold."""
    config: Any = experiment.model.config  # type: ignore[attr-defined]
    if not isinstance(config, TransformerConfig) or not hasattr(experiment.model, "empty_cache"):
        return False
    mixers = {layer.mixer for layer in config.layer_types(config.n_layers)}
    return mixers == {ATTENTION} and experiment.mesh.shape["stage"] == 1


def choose_context(experiment: Experiment, options: EngineOptions) -> int:
    """Return the most tokens of a prompt and its reply.

    Raises:
        UserError: the model has no positions for so many.
    """
    config, most = experiment.config, context_length(experiment.model)
    if most is not None and options.context > most:
        raise UserError(f"--context {options.context} is beyond the model's {most} positions")
    return options.context or int(config.model.max_length or config.data.sequence_length)


def chunk_lengths(options: EngineOptions) -> list[int]:
    """Return the lengths that chunks of prompts are padded to: few, for few programs."""
    lengths = [options.page_size]
    while lengths[-1] * 4 < options.chunk:
        lengths.append(lengths[-1] * 4)
    return [*lengths, options.chunk]


def warm_up_requests(options: EngineOptions, context: int) -> list[GenerationRequest]:
    """Return requests that need each compiled program of an engine once.

    Prompts of each length of a chunk; and as many replies as there are rows, which begin one after
    the other, so that every size of a batch comes.

    Args:
        options: sizes of the engine.
        context: most tokens of a prompt and its reply.
    """
    lengths = [min(length, context - 1) for length in chunk_lengths(options)]
    most = min(options.n_rows + 1, context - 1)
    # They begin with different tokens, so that none uses the pages of another.
    prompts = [GenerationRequest((i,) * n, 1) for i, n in enumerate(lengths)]
    return [*prompts, *[GenerationRequest((len(lengths),), most)] * options.n_rows]


def count_pages(experiment: Experiment, options: EngineOptions) -> int:
    """Return the number of pages: at least those of one row, at most those that all rows can use.

    Args:
        experiment: experiment on a mesh, prepared for decoding, whose parameters are in memory.
        options: sizes.
    """
    config: Any = experiment.model.config  # type: ignore[attr-defined]
    of_row = ceil(choose_context(experiment, options) / options.page_size)
    if options.n_pages:
        return options.n_pages
    one = jax.eval_shape(partial(empty_pages, config, config.n_layers, 1, options.page_size))
    n_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(one))
    device = experiment.mesh.devices.flat[0]
    stats = device.memory_stats() or {}
    free = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
    if device.platform == "cpu":
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    shards = experiment.mesh.shape["tensor"] if config.n_kv_heads else 1
    if config.n_kv_heads % shards:
        shards = 1
    most = int(free * _OF_MEMORY) * shards // n_bytes if free else options.n_rows * of_row
    return max(of_row, min(options.n_rows * of_row, most))
