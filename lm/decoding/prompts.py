"""Prompts and sources as arrays: what a model's context holds, and padding to few shapes."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import numpy as np

from lm.errors import UserError

Tokens = Sequence[int] | np.ndarray
_SHORTEST = 16


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model encodes a source, rather than continuing a prompt."""
    return hasattr(model, "start")


def context_of(model: nn.Module) -> int | None:
    """How many tokens the model has positions for; None: as many as there are."""
    config = model.config  # type: ignore[attr-defined]
    return config.max_length if getattr(config, "positions", "none") == "learned" else None


def check_prompts(prompts: Sequence[Tokens], context: int | None) -> None:
    """Raise UserError for a prompt that cannot be continued."""
    for number, prompt in enumerate(prompts, 1):
        if not len(prompt):
            raise UserError(
                f"prompt {number} is empty, and the tokenizer has no token to start with"
            )
        if context is not None and len(prompt) >= context:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens; the context holds {context}, "
                "one of them for the continuation"
            )


def few_widths(longest: int) -> int:
    """The next power of two: so that many lengths are compiled for few."""
    return max(_SHORTEST, 1 << (longest - 1).bit_length())


def pad(rows: Sequence[Tokens], width: int, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segments [B, width], int32; padding, on the left or on the right, is 0."""
    tokens_BL = np.zeros((len(rows), width), np.int32)
    segments_BL = np.zeros_like(tokens_BL)
    for i, row in enumerate(rows):
        there = slice(width - len(row), width) if left else slice(0, len(row))
        tokens_BL[i, there] = row
        segments_BL[i, there] = 1
    return tokens_BL, segments_BL
