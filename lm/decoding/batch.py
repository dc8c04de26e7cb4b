"""Decoding of many inputs in batches of similar length, with outputs in input order.

Shape letters: B inputs, L source or prompt length, R rows, K beam, T maximum new tokens,
V vocabulary.
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

from lm.data.special_tokens import target_start
from lm.data.tokenizer import Tokenizer
from lm.decoding.beam import BeamOptions, DecodingCache, beam_search
from lm.decoding.controls import UNSET, Controls
from lm.decoding.prompts import (
    TokenIds,
    check_ids,
    check_prompts,
    context_length,
    first_inputs,
    is_encoder_decoder,
    pad_ids,
    pad_sources,
    padded_length,
)
from lm.decoding.sampling import Sampling, decode_last, sample_steps
from lm.decoding.weights import prepare
from lm.experiment import Experiment
from lm.models.variables import Params, as_variables
from lm.parallel.mesh import BATCH_AXES

Progress = Callable[[int], Any]
_BATCHES_SORTED = (
    16  # inputs sorted by length together: more reduce padding, but a crash loses more work
)


@dataclass(frozen=True)
class Hypothesis:
    """Output for one input: token ids without the end token, and a score unless sampled."""

    tokens: list[int]
    score: float | None


def decode_best(
    experiment: Experiment,
    params: Params,
    tokenizer: Tokenizer,
    inputs: Sequence[TokenIds],
    options: BeamOptions,
    progress: Progress = lambda n: None,
) -> list[list[int]]:
    """Return the best hypothesis of each input as token ids.

    Args:
        experiment: experiment on a mesh.
        params: parameters.
        tokenizer: tokenizer of the data.
        inputs: token ids of sources (including eos) or, without an encoder, of prompts; log-mel
            features [F, M] for a speech model.
        options: beam size, lengths and controls.
        progress: called with the number of inputs in each finished batch.
    """
    found = search_batches(experiment, params, tokenizer, inputs, options, progress=progress)
    return [hypotheses[0].tokens if hypotheses else [] for hypotheses in found]


def search_batches(
    experiment: Experiment,
    params: Params,
    tokenizer: Tokenizer,
    inputs: Sequence[TokenIds],
    options: BeamOptions,
    start: int = 0,
    progress: Progress = lambda n: None,
) -> Iterator[list[Hypothesis]]:
    """Yield the beam-search hypotheses of each input, best first, in input order.

    Args:
        experiment: experiment on a mesh.
        params: parameters.
        tokenizer: tokenizer of the data.
        inputs: token ids of sources (including eos) or, without an encoder, of prompts; log-mel
            features [F, M] for a speech model.
        options: beam size, lengths and controls.
        start: index of the first input to process.
        progress: called with the number of inputs in each finished batch.
    """
    experiment, params = prepare(experiment, params)
    model, batch_size = experiment.model, experiment.config.decode.batch_size
    context = context_length(model)
    start_ids: tuple[int, ...] = ()
    if is_encoder_decoder(model):
        start_ids = target_start(tokenizer, experiment.config.data.target_prefix)
        has_ids = not experiment.config.model.n_mels
        check_ids([*(inputs if has_ids else ()), start_ids], model)
        context = context and context - len(start_ids) + 1
    else:
        check_prompts(inputs, context)
        check_ids(inputs, model)
    options = replace(options, max_length=min(options.max_length, context or options.max_length))
    n_rows = min(batch_size, len(inputs))

    def decode(numbers: Sequence[int]) -> list[list[Hypothesis]]:
        batch = [inputs[i] for i in numbers]
        return _search_batch(experiment, params, start_ids, options, batch, n_rows)

    return _in_order(inputs, batch_size, decode, start, progress)


def sample_batches(
    experiment: Experiment,
    params: Params,
    prompts: Sequence[TokenIds],
    sampling: Sampling,
    seed: int,
    controls: Controls,
    start: int = 0,
    progress: Progress = lambda n: None,
) -> Iterator[list[Hypothesis]]:
    """Yield a sampled continuation of each prompt, in order.

    It depends on the prompt, its index and the seed, not on the batches.

    Args:
        experiment: experiment on a mesh.
        params: parameters.
        prompts: token ids of each prompt.
        sampling: options.
        seed: seed of all samples.
        controls: constraints on new tokens.
        start: index of the first prompt to process.
        progress: called with the number of prompts in each finished batch.
    """
    experiment, params = prepare(experiment, params)
    config = experiment.config
    check_prompts(prompts, context_length(experiment.model))

    def sample(numbers: Sequence[int]) -> list[list[Hypothesis]]:
        steps = sample_steps(
            experiment.model,
            params,
            [prompts[i] for i in numbers],
            config.decode.max_length,
            sampling,
            seed,
            controls,
            has_prefix=experiment.objective.has_prefix,
            numbers=numbers,
        )
        rows = np.stack([np.full(len(numbers), UNSET), *steps], axis=1)
        return [[Hypothesis(row[row != UNSET].tolist(), None)] for row in rows]

    return _in_order(prompts, config.decode.batch_size, sample, start, progress)


def _in_order(
    inputs: Sequence[TokenIds],
    batch_size: int,
    decode: Callable[[Sequence[int]], list[list[Hypothesis]]],
    start: int,
    progress: Progress,
) -> Iterator[list[Hypothesis]]:
    """Yield the outputs of `decode` in order; it is called with the indices of a batch."""
    window = batch_size * _BATCHES_SORTED
    # Windows do not depend on `start`, so that a restart decodes the same batches.
    for first in range(start - start % window, len(inputs), window):
        end = min(first + window, len(inputs))
        longest_first = sorted(range(first, end), key=lambda i: len(inputs[i]), reverse=True)
        done: dict[int, list[Hypothesis]] = {}
        for at in range(0, len(longest_first), batch_size):
            numbers = longest_first[at : at + batch_size]
            if n_new := sum(i >= start for i in numbers):
                done |= zip(numbers, decode(numbers), strict=True)
                progress(n_new)
        yield from (done[i] for i in range(max(first, start), end))


def _search_batch(
    experiment: Experiment,
    params: Params,
    start_ids: tuple[int, ...],
    options: BeamOptions,
    inputs: Sequence[TokenIds],
    n_rows: int,
) -> list[list[Hypothesis]]:
    """Return the hypotheses of each input; rows are padded to `n_rows` and to the mesh."""
    model, mesh = experiment.model, experiment.mesh
    shards = prod(mesh.shape[axis] for axis in BATCH_AXES)
    n_rows = -(-n_rows // shards) * shards
    filled = [*inputs, *[inputs[-1]] * (n_rows - len(inputs))]
    if is_encoder_decoder(model):
        arrays = pad_sources(filled, model)
    else:
        arrays = pad_ids(filled, padded_length(max(map(len, filled))), left=True)
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    inputs_BL, segments_BL = (
        jax.make_array_from_callback(x.shape, rows, x.__getitem__) for x in arrays
    )
    has_prefix = experiment.objective.has_prefix
    found = _search(model, options, mesh, has_prefix, start_ids, params, inputs_BL, segments_BL)
    end_ids = options.controls.end_ids
    hypotheses = zip(*map(np.asarray, jax.device_get(found)), strict=True)
    return [
        [
            Hypothesis(_without_end(tokens[:length].tolist(), end_ids), float(score))
            for tokens, score, length in zip(*row, strict=True)
            if length
        ]
        for row, _ in zip(hypotheses, inputs, strict=False)
    ]


def _without_end(tokens: list[int], end_ids: tuple[int, ...]) -> list[int]:
    return tokens[:-1] if tokens[-1] in end_ids else tokens


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _search(
    model: nn.Module,
    options: BeamOptions,
    mesh: Mesh,
    has_prefix: bool,
    start_ids: tuple[int, ...],
    params: Params,
    inputs_BL: jax.Array,
    segments_BL: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Run `beam_search` on inputs [B, L], or features; the result is replicated on every device."""

    def call(*inputs: Any, method: str) -> Any:
        return model.apply(as_variables(params), *inputs, method=method)

    def decode(
        tokens_R1: jax.Array, positions_R1: jax.Array, cache: DecodingCache
    ) -> tuple[jax.Array, DecodingCache]:
        return decode_last(model, params, tokens_R1, positions_R1, jnp.ones_like(tokens_R1), cache)

    B, L = segments_BL.shape
    lengths_B = segments_BL.sum(-1)
    room = context_length(model) or options.max_length + L
    if is_encoder_decoder(model):
        P = len(start_ids)
        cache = call(inputs_BL, segments_BL, P - 1 + options.max_length, method="start")
        logits_BLV, cache = decode_last(model, params, *first_inputs(start_ids, B), cache)
        lengths_B, limits_B = jnp.full_like(lengths_B, P), jnp.full((B,), room - P + 1)
    else:
        positions_BL = jnp.maximum(jnp.arange(L) - (L - lengths_B)[:, None], 0)
        cache = call(B, L + options.max_length, method="empty_cache")
        prefix = (segments_BL,) if has_prefix else ()
        logits_BLV, cache = decode_last(
            model, params, inputs_BL, positions_BL, segments_BL, cache, *prefix
        )
        limits_B = room - lengths_B
    found = beam_search(decode, cache, logits_BLV[:, -1], lengths_B, limits_B, options)
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.lax.with_sharding_constraint(found, (replicated,) * 3)
