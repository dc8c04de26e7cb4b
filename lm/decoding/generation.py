"""From texts to the texts that a model makes of them: continuations of prompts, or targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lm.data.tokenizers.tokenizer import Tokenizer
from lm.decoding.batch import decode_records, sample_records
from lm.decoding.options import controls_of, search_of
from lm.decoding.prompts import is_encoder_decoder
from lm.decoding.sampling import Sampling
from lm.decoding.sampling_loop import generate
from lm.experiment import Experiment
from lm.objectives.special_tokens import special_tokens
from lm.train_step import Params


@dataclass(frozen=True)
class Generation:
    """A text, and the score that hypotheses are compared by; None if it was sampled."""

    text: str
    score: float | None


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """A document's beginning: the start token, where there is one, and the text."""
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return start + [int(token) for token in tokenizer.encode(text)]


def source_ids(tokenizer: Tokenizer, text: str, length: int) -> list[int]:
    """What an encoder reads: the text, cut to `length` tokens with the end token."""
    return [*tokenizer.encode(text)[: length - 1].tolist(), special_tokens(tokenizer).eos]


def write(
    experiment: Experiment,
    params: Params,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    sampling: Sampling | None,
    seed: int,
    start: int = 0,
    progress: Callable[[int], Any] = lambda n: None,
) -> Iterator[list[Generation]]:
    """What is written for each text from number `start` on, best first, in order.

    Sources get targets, prompts continuations (without the prompt): by search or, with `sampling`,
    one sample. `progress` is told how many more are done.
    """
    config, model = experiment.config, experiment.model
    of_source = is_encoder_decoder(model)
    if of_source:
        ids = [source_ids(tokenizer, text, config.data.sequence_length) for text in texts]
    else:
        ids = [prompt_ids(tokenizer, text) for text in texts]
    if sampling is None:
        search = search_of(config, tokenizer)
        found = decode_records(experiment, params, tokenizer, ids, search, start, progress)
    else:
        controls = controls_of(config, tokenizer)
        found = sample_records(experiment, params, ids, sampling, seed, controls, start, progress)
    for prompt, outputs in zip(ids[start:], found, strict=True):
        before = [] if of_source else prompt
        yield [Generation(text_after(tokenizer, before, o.tokens), o.score) for o in outputs]


def record(role: str, text: str, written: Sequence[Generation], n_best: int) -> dict[str, Any]:
    """What was written for a text, as an object of JSON; `role` says what the text is."""
    best = {name: getattr(written[0], name) if written else None for name in ("text", "score")}
    found: dict[str, Any] = {role: text, **best, "text": best["text"] or ""}
    if best["score"] is None:
        del found["score"]
    if n_best > 1:
        found["hypotheses"] = [{"text": w.text, "score": w.score} for w in written[:n_best]]
    return found


def continuations(
    experiment: Experiment,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    seed: int,
) -> Iterator[list[str]]:
    """The new text of every prompt after each step; joined, a row's parts are its continuation.

    A character whose bytes are not complete yet is held back.
    """
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    new: list[list[int]] = [[] for _ in ids]
    shown = [""] * len(ids)
    steps = generate(
        experiment.model,
        params,
        ids,
        experiment.config.decode.max_length,
        sampling,
        seed,
        controls_of(experiment.config, tokenizer),
        is_prefix=experiment.config.objective.name == "prefix",
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
    """What `new` adds to the prompt's text; decoded with it, as spaces depend on what is before.

    Ids that the tokenizer lacks (a padded vocabulary has some) are no text.
    """
    known = [token for token in new if token < tokenizer.vocab_size]
    return tokenizer.decode([*prompt, *known]).rstrip("\ufffd")[len(tokenizer.decode(prompt)) :]
