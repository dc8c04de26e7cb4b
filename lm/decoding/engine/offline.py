"""Offline generation for many prompts with an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lm.decoding.batch import Hypothesis
from lm.decoding.controls import Controls
from lm.decoding.engine.engine import PagedEngine
from lm.decoding.engine.requests import GenerationRequest
from lm.decoding.engine.sizes import EngineOptions
from lm.decoding.prompts import TokenIds, check_prompts, context_length
from lm.decoding.sampling import Sampling
from lm.decoding.weights import prepare
from lm.experiment import Experiment
from lm.models.variables import Params


def sample_by_engine(
    experiment: Experiment,
    params: Params,
    prompts: Sequence[TokenIds],
    sampling: Sampling,
    seed: int,
    controls: Controls,
    start: int = 0,
    progress: Callable[[int], Any] = lambda n: None,
) -> Iterator[list[Hypothesis]]:
    """Yield the continuations of `sample_batches`, with continuous batching.

    Args:
        experiment: experiment on a mesh, of a model that `is_pageable`.
        params: parameters.
        prompts: token ids of each prompt.
        sampling: options.
        seed: seed of all samples.
        controls: constraints on new tokens.
        start: index of the first prompt to process.
        progress: called with 1 for each finished prompt.
    """
    experiment, params = prepare(experiment, params)
    check_prompts(prompts, context_length(experiment.model))
    decode, n = experiment.config.decode, len(prompts)
    context = context_length(experiment.model) or max(map(len, prompts)) + decode.max_length
    n_rows = min(decode.batch_size, n)
    engine = PagedEngine(experiment, params, EngineOptions(n_rows, context))
    options: Any = {"temperature": sampling.temperature, "top_k": sampling.top_k, "seed": seed}
    options |= {"top_p": sampling.top_p, "min_new_tokens": controls.min_length}
    options |= {"repetition_penalty": controls.repetition_penalty, "banned": controls.banned}
    options |= {"end_ids": controls.end_ids, "limits": controls.limits}
    places: dict[int, int] = {}  # index of the prompt by request id
    tokens: dict[int, list[int]] = {}
    done: dict[int, list[Hypothesis]] = {}
    given = shown = start
    while shown < n:
        while given < min(n, shown + 2 * n_rows):
            prompt = tuple(map(int, prompts[given]))
            request = GenerationRequest(prompt, decode.max_length, number=given, **options)
            places[engine.add(request)] = given
            tokens[given] = []
            given += 1
        for found in engine.step():
            place = places[found.request]
            tokens[place] += [token.id for token in found.tokens]
            if found.finish:
                done[place] = [Hypothesis(tokens.pop(place), None)]
                progress(1)
        while shown in done:
            yield done.pop(shown)
            shown += 1
