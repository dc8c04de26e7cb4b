"""Where words start, as each kind of vocabulary writes it."""

from __future__ import annotations

import numpy as np

from lm.data.tokenizers.tokenizer import Tokenizer

_SPACES = (" ", "▁", "Ġ")  # the latter as SentencePiece and GPT-2 write them
_OTHER_WHITESPACE = ("\n", "\t", "\r", "Ċ", "ĉ", "č")


def word_starts(tokenizer: Tokenizer) -> np.ndarray:
    """Which ids start a word, bool [vocabulary].

    All that WordPiece does not mark with "##"; all that bring the space before them where any
    does, as in SentencePiece, byte-level BPE, bytes and characters; or simply all.
    """
    pieces = tokenizer.chunks()
    goes_on = np.array([piece.startswith("##") for piece in pieces])
    after_space = np.array([piece.startswith(_SPACES) for piece in pieces])
    if goes_on.sum() > after_space.sum():
        return ~goes_on
    if not after_space.any():
        return ~after_space
    return after_space | [piece.startswith(_OTHER_WHITESPACE) for piece in pieces]
