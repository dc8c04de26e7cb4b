"""Whole test sets: inputs of like length are decoded together, and outputs come in order.

Shape letters: B inputs, L source or prompt length, K beam, T most new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.data.tokenizers.tokenizer import Tokenizer
from lm.decoding.beam import Cache, Search, beam_search
from lm.decoding.controls import UNSET, Controls
from lm.decoding.prompts import (
    Tokens,
    check_prompts,
    context_of,
    few_widths,
    is_encoder_decoder,
    pad,
)
from lm.decoding.sampling import Sampling
from lm.decoding.sampling_loop import generate
from lm.experiment import Experiment
from lm.models.variables import as_variables
from lm.objectives.special_tokens import special_tokens
from lm.parallel.sharding import BATCH_AXES
from lm.train_step import Params

Progress = Callable[[int], Any]
_BATCHES_SORTED = 16  # together by length: more save padding, fewer are lost in a crash


@dataclass(frozen=True)
class Output:
    """Token ids without the end token, and the score that hypotheses are compared by.

    A sampled output has no score.
    """

    tokens: list[int]
    score: float | None


def transduce(
    experiment: Experiment,
    params: Params,
    tokenizer: Tokenizer,
    sources: Sequence[Tokens],
    search: Search,
) -> list[list[int]]:
    """The best output of each source (that ends with eos) or prompt, as token ids."""
    found = decode_records(experiment, params, tokenizer, sources, search)
    return [outputs[0].tokens if outputs else [] for outputs in found]


def decode_records(
    experiment: Experiment,
    params: Params,
    tokenizer: Tokenizer,
    inputs: Sequence[Tokens],
    search: Search,
    start: int = 0,
    progress: Progress = lambda n: None,
) -> Iterator[list[Output]]:
    """The hypotheses of each input from number `start` on, best first, in the order of the inputs.

    Inputs are what the encoder reads (eos included) or, for other models, prompts. `progress` is
    told how many more inputs are done.
    """
    model, batch_size = experiment.model, experiment.config.decode.batch_size
    context = context_of(model)
    if not is_encoder_decoder(model):
        check_prompts(inputs, context)
    search = replace(search, max_length=min(search.max_length, context or search.max_length))
    bos, n_rows = special_tokens(tokenizer).bos, min(batch_size, len(inputs))

    def decode(numbers: Sequence[int]) -> list[list[Output]]:
        batch = [inputs[i] for i in numbers]
        return _search_batch(experiment, params, bos, search, batch, n_rows)

    return _in_order(inputs, batch_size, decode, start, progress)


def sample_records(
    experiment: Experiment,
    params: Params,
    prompts: Sequence[Tokens],
    sampling: Sampling,
    seed: int,
    controls: Controls,
    start: int = 0,
    progress: Progress = lambda n: None,
) -> Iterator[list[Output]]:
    """A sampled continuation of each prompt from number `start` on, in order.

    It depends on the prompt, its number and the seed.
    """
    config = experiment.config
    check_prompts(prompts, context_of(experiment.model))

    def sample(numbers: Sequence[int]) -> list[list[Output]]:
        steps = generate(
            experiment.model,
            params,
            [prompts[i] for i in numbers],
            config.decode.max_length,
            sampling,
            seed,
            controls,
            is_prefix=config.objective.name == "prefix",
            numbers=numbers,
        )
        rows = np.stack([np.full(len(numbers), UNSET), *steps], axis=1)
        return [[Output(row[row != UNSET].tolist(), None)] for row in rows]

    return _in_order(prompts, config.decode.batch_size, sample, start, progress)


def _in_order(
    inputs: Sequence[Tokens],
    batch_size: int,
    decode: Callable[[Sequence[int]], list[list[Output]]],
    start: int,
    progress: Progress,
) -> Iterator[list[Output]]:
    """What `decode` makes of the numbers of inputs, batch by batch, from number `start` on."""
    window = batch_size * _BATCHES_SORTED
    # Windows lie where they always do, so that a second start decodes the same batches.
    for first in range(start - start % window, len(inputs), window):
        end = min(first + window, len(inputs))
        longest_first = sorted(range(first, end), key=lambda i: len(inputs[i]), reverse=True)
        done: dict[int, list[Output]] = {}
        for at in range(0, len(longest_first), batch_size):
            numbers = longest_first[at : at + batch_size]
            if n_new := sum(i >= start for i in numbers):
                done |= zip(numbers, decode(numbers), strict=True)
                progress(n_new)
        yield from (done[i] for i in range(max(first, start), end))


def _search_batch(
    experiment: Experiment,
    params: Params,
    bos: int,
    search: Search,
    inputs: Sequence[Tokens],
    n_rows: int,
) -> list[list[Output]]:
    """The hypotheses of each input; the batch is filled up to `n_rows` and to the mesh."""
    model, mesh = experiment.model, experiment.mesh
    shards = prod(mesh.shape[axis] for axis in BATCH_AXES)
    n_rows = -(-n_rows // shards) * shards
    filled = [*inputs, *[inputs[-1]] * (n_rows - len(inputs))]
    width = few_widths(max(map(len, filled)))
    if is_encoder_decoder(model):
        arrays = pad(filled, min(width, context_of(model) or width), left=False)
    else:
        arrays = pad(filled, width, left=True)
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    tokens_BL, segments_BL = (
        jax.make_array_from_callback(x.shape, rows, x.__getitem__) for x in arrays
    )
    is_prefix = experiment.config.objective.name == "prefix"
    found = _search(model, search, mesh, is_prefix, bos, params, tokens_BL, segments_BL)
    hypotheses = zip(*map(np.asarray, jax.device_get(found)), strict=True)
    return [
        [
            Output(_without_end(tokens[:length].tolist(), search.controls.end_id), float(score))
            for tokens, score, length in zip(*row, strict=True)
            if length
        ]
        for row, _ in zip(hypotheses, inputs, strict=False)
    ]


def _without_end(tokens: list[int], end_id: int | None) -> list[int]:
    return tokens[:-1] if tokens[-1] == end_id else tokens


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _search(
    model: nn.Module,
    search: Search,
    mesh: Mesh,
    is_prefix: bool,
    bos: int,
    params: Params,
    tokens_BL: jax.Array,
    segments_BL: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What `beam_search` gives, on every device."""

    def call(*inputs: Any, method: str) -> Any:
        return model.apply(as_variables(params), *inputs, method=method)

    def decode(tokens_R1: jax.Array, at_R1: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        return call(tokens_R1, at_R1, jnp.ones_like(tokens_R1), cache, method="decode")

    B, L = tokens_BL.shape
    lengths_B = segments_BL.sum(-1)
    room = context_of(model) or search.max_length + L
    if is_encoder_decoder(model):
        cache = call(tokens_BL, segments_BL, search.max_length, method="start")
        first_B1 = jnp.full((B, 1), bos)
        logits_BLV, cache = decode(first_B1, jnp.zeros_like(first_B1), cache)
        lengths_B, limits_B = jnp.ones_like(lengths_B), jnp.full((B,), room)
    else:
        positions_BL = jnp.maximum(jnp.arange(L) - (L - lengths_B)[:, None], 0)
        cache = call(B, L + search.max_length, method="empty_cache")
        prefix = (segments_BL,) if is_prefix else ()
        logits_BLV, cache = call(
            tokens_BL, positions_BL, segments_BL, cache, *prefix, method="decode"
        )
        limits_B = room - lengths_B
    found = beam_search(decode, cache, logits_BLV[:, -1], lengths_B, limits_B, search)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.lax.with_sharding_constraint(found, (everywhere,) * 3)
