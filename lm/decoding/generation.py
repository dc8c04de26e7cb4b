"""Generation from text to text: continuations of prompts, or targets of sources."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lm.data.tokenizers.tokenizer import Tokenizer
from lm.decoding.batch import sample_batches, search_batches
from lm.decoding.beam import BeamOptions
from lm.decoding.controls import Controls
from lm.decoding.prompts import is_encoder_decoder, prompt_ids, source_ids
from lm.decoding.sampling import Sampling, sample_steps
from lm.experiment import Experiment
from lm.models.variables import Params


@dataclass(frozen=True)
class Generation:
    """Generated text, and its score; None if it was sampled."""

    text: str
    score: float | None


def generate_texts(
    experiment: Experiment,
    params: Params,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    sampling: Sampling | None,
    seed: int,
    start: int = 0,
    progress: Callable[[int], Any] = lambda n: None,
) -> Iterator[list[Generation]]:
    """Yield the texts generated for each input, best first, in the inputs' order.

    Args:
        experiment: experiment on a mesh.
        params: its parameters.
        tokenizer: tokenizer of the data.
        texts: sources, or prompts, which are not repeated in the output.
        sampling: options of one sample an input; None: beam search.
        seed: seed of the samples.
        start: index of the first input whose texts are yielded.
        progress: called with the number of inputs of each finished batch.
    """
    config = experiment.config
    has_source = is_encoder_decoder(experiment.model)
    if has_source:
        ids = [source_ids(tokenizer, text, config.data.sequence_length) for text in texts]
    else:
        ids = [prompt_ids(tokenizer, text) for text in texts]
    if sampling is None:
        options = BeamOptions.from_config(config, tokenizer)
        found = search_batches(experiment, params, tokenizer, ids, options, start, progress)
    else:
        controls = Controls.from_config(config, tokenizer)
        found = sample_batches(experiment, params, ids, sampling, seed, controls, start, progress)
    for prompt, hypotheses in zip(ids[start:], found, strict=True):
        before = [] if has_source else prompt
        yield [Generation(text_after(tokenizer, before, h.tokens), h.score) for h in hypotheses]


def generation_record(
    role: str, text: str, generations: Sequence[Generation], n_best: int
) -> dict[str, Any]:
    """Return the generations of a text as a JSON object.

    Args:
        role: name of the text: "source" or "prompt".
        text: input.
        generations: generated texts, best first.
        n_best: number of them to list under "hypotheses"; 1: no list.
    """
    if not generations:
        found: dict[str, Any] = {role: text, "text": ""}
    elif generations[0].score is None:
        found = {role: text, "text": generations[0].text}
    else:
        found = {role: text, **asdict(generations[0])}
    if n_best > 1:
        found["hypotheses"] = [asdict(generation) for generation in generations[:n_best]]
    return found


def stream_continuations(
    experiment: Experiment,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    seed: int,
) -> Iterator[list[str]]:
    """Yield the new text of every prompt after each step; joined they are its continuation.

    A character whose bytes are not complete yet is held back.

    Args:
        experiment: experiment on a mesh.
        params: its parameters.
        tokenizer: tokenizer of the data.
        prompts: texts to continue.
        sampling: options.
        seed: seed of the samples.
    """
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    new: list[list[int]] = [[] for _ in ids]
    shown = [""] * len(ids)
    steps = sample_steps(
        experiment.model,
        params,
        ids,
        experiment.config.decode.max_length,
        sampling,
        seed,
        Controls.from_config(experiment.config, tokenizer),
        has_prefix=experiment.objective.has_prefix,
    )
    for tokens in steps:
        parts = []
        for i, token in enumerate(np.asarray(tokens)):
            if token >= 0:
                new[i].append(int(token))
            complete = text_after(tokenizer, ids[i], new[i])
            parts.append(complete[len(shown[i]) :])
            shown[i] = max(shown[i], complete, key=len)
        yield parts


def text_after(tokenizer: Tokenizer, prompt: list[int], new: list[int]) -> str:
    """Return the text that new tokens add to a prompt.

    They are decoded together with it, because a space may depend on the token before. Ids beyond
    the tokenizer's (of a padded vocabulary) are skipped.
    """
    known = [token for token in new if token < tokenizer.vocab_size]
    return tokenizer.decode([*prompt, *known]).rstrip("\ufffd")[len(tokenizer.decode(prompt)) :]
