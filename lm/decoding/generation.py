"""Text generation: continuations of prompts, targets of sources, and answers in chats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from ml_collections import ConfigDict

from lm.data.tokenizer import Tokenizer
from lm.decoding.batch import sample_batches, search_batches
from lm.decoding.beam import BeamOptions
from lm.decoding.chats import Chat, chat_controls, chat_ids, stop_texts
from lm.decoding.controls import Controls
from lm.decoding.engine.offline import sample_by_engine
from lm.decoding.engine.sizes import is_pageable
from lm.decoding.generated import Generation
from lm.decoding.guard import open_guard
from lm.decoding.prompts import is_encoder_decoder, prompt_ids, source_ids
from lm.decoding.sampling import Sampling, sample_steps
from lm.decoding.text_stream import TextStream, text_after, text_before
from lm.decoding.weights import prepare
from lm.experiment import Experiment
from lm.models.variables import Params

if TYPE_CHECKING:
    from lm.data.chat.chat_template import ChatTemplate
    from lm.decoding.best_of import BestOf

_STREAMED = 4  # tokens that are streamed together


def generate_texts(
    experiment: Experiment,
    params: Params,
    tokenizer: Tokenizer,
    texts: Sequence[str] | Sequence[Chat],
    sampling: Sampling | None,
    seed: int,
    start: int = 0,
    progress: Callable[[int], Any] = lambda n: None,
    stop: Sequence[str] = (),
    best_of: BestOf | None = None,
    template: ChatTemplate | None = None,
) -> Iterator[list[Generation]]:
    """Yield the generated texts of each input, best first, in the order of the inputs.

    Args:
        experiment: experiment on a mesh.
        params: parameters.
        tokenizer: tokenizer of the data.
        texts: sources, prompts (not repeated in the output), or conversations; paths of recordings
            for a speech model.
        sampling: options for one sample per input; None: beam search.
        seed: seed of the samples.
        start: index of the first input to process.
        progress: called with the number of inputs in each finished batch.
        stop: texts at which the output is cut off.
        best_of: take several samples per input, and rank them.
        template: chat template for conversations; None: the inputs are texts.
    """
    if best_of:

        def sample(repeated: Sequence[Any], start: int) -> Iterator[list[Generation]]:
            arguments = repeated, sampling, seed, start
            options: Any = {"stop": stop, "template": template}
            return generate_texts(experiment, params, tokenizer, *arguments, **options)

        return best_of.ordered(texts, start, sample, progress)
    guard = open_guard(experiment.config.decode)

    def generate() -> Iterator[list[Generation]]:
        config = experiment.config
        has_source = is_encoder_decoder(experiment.model)
        controls, stops = _ends(config, tokenizer, stop, template)
        ids: Any
        if config.model.n_mels:
            from lm.data.audio.audio_inputs import recording_sources

            ids = recording_sources([str(path) for path in texts], config.data)
        elif has_source:
            length = config.data.sequence_length
            ids = [source_ids(tokenizer, str(text), length) for text in texts]
        else:
            ids = [_input_ids(tokenizer, text, template) for text in texts]
        if sampling is None:
            options = replace(BeamOptions.from_config(config, tokenizer), controls=controls)
            found = search_batches(experiment, params, tokenizer, ids, options, start, progress)
        else:
            # With several processes, the engines would have to agree on the order of requests.
            by_engine = is_pageable(experiment) and jax.process_count() == 1
            sample_all = sample_by_engine if by_engine else sample_batches
            found = sample_all(experiment, params, ids, sampling, seed, controls, start, progress)
        for prompt, hypotheses in zip(ids[start:], found, strict=True):
            before = [] if has_source else prompt
            yield [
                Generation(text_before(stops, text_after(tokenizer, before, h.tokens)), h.score)
                for h in hypotheses
            ]

    return guard.screened(generate()) if guard else generate()


def _input_ids(tokenizer: Tokenizer, text: str | Chat, template: ChatTemplate | None) -> list[int]:
    """Return the token ids of a prompt, or of a conversation."""
    if isinstance(text, Chat):
        assert template is not None
        return chat_ids(template, text)
    return prompt_ids(tokenizer, text)


def _ends(
    config: ConfigDict, tokenizer: Tokenizer, stop: Sequence[str], template: ChatTemplate | None
) -> tuple[Controls, Sequence[str]]:
    """Return the controls of an output, and its stop texts."""
    if template is None:
        return Controls.from_config(config, tokenizer), stop
    return chat_controls(config, tokenizer, template), (*stop, *stop_texts(template))


def stream_continuations(
    experiment: Experiment,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str] | Sequence[Chat],
    sampling: Sampling,
    seed: int,
    stop: Sequence[str] = (),
    template: ChatTemplate | None = None,
) -> Iterator[list[str]]:
    """Yield the new text of every prompt after each step; concatenated, it is the continuation.

    Text that may still change is held back (`TextStream`).

    Args:
        experiment: experiment on a mesh.
        params: parameters.
        tokenizer: tokenizer of the data.
        prompts: texts to continue, or conversations to answer.
        sampling: options.
        seed: seed of the samples.
        stop: texts at which a continuation is cut off.
        template: chat template for conversations; None: the prompts are texts.
    """
    if open_guard(experiment.config.decode):  # the guard judges complete texts only
        options: Any = {"stop": stop, "template": template}
        found = generate_texts(experiment, params, tokenizer, prompts, sampling, seed, **options)
        yield [generations[0].text for generations in found]
        return
    experiment, params = prepare(experiment, params)
    ids = [_input_ids(tokenizer, prompt, template) for prompt in prompts]
    controls, stop = _ends(experiment.config, tokenizer, stop, template)
    streams = [TextStream(tokenizer, prompt, stop) for prompt in ids]
    steps = sample_steps(
        experiment.model,
        params,
        ids,
        experiment.config.decode.max_length,
        sampling,
        seed,
        controls,
        has_prefix=experiment.objective.has_prefix,
        per_dispatch=_STREAMED,
    )
    for tokens in steps:
        added = [[int(token)] if token >= 0 else [] for token in np.asarray(tokens)]
        yield [stream.push(new) for stream, new in zip(streams, added, strict=True)]
        if all(stream.stopped for stream in streams):
            return
    held = [stream.finish() for stream in streams]
    if any(held):
        yield held
