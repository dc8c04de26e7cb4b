"""From prompts as text to continuations as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from lm.data.tokenizers import Tokenizer
from lm.decoding.generate import generate
from lm.decoding.sampling import Sampling
from lm.models.decoder import Decoder
from lm.steps import Params


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """A document's beginning: the start token, where there is one, and the text."""
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return start + [int(token) for token in tokenizer.encode(text)]


def continuations(
    model: Decoder,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
) -> Iterator[list[str]]:
    """The new text of every prompt after each step; joined, a row's parts are its continuation.

    A character whose bytes are not complete yet is held back.
    """
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    shown = [tokenizer.decode(row) for row in ids]
    for tokens in generate(model, params, ids, max_new_tokens, sampling, seed, tokenizer.eos_id):
        parts = []
        for i, token in enumerate(np.asarray(tokens)):
            if token >= 0:
                ids[i].append(int(token))
            complete = tokenizer.decode(ids[i]).rstrip("\ufffd")
            parts.append(complete[len(shown[i]) :])
            shown[i] = max(shown[i], complete, key=len)
        yield parts
