"""Tokens of a text with the characters they stand for, under any tokenizer."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# Scripts without spaces between words: every character is a word, as in BERT's vocabulary.
_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# Accents and vowel signs belong to the letter before them, but re does not count them as \w.
_MARKS = "".join(chr(i) for i in range(0x10000) if unicodedata.category(chr(i))[0] == "M")
_WORD = re.compile(rf"[{_ALONE}]|(?:(?![{_ALONE}])[\w{_MARKS}])+|[^\w\s{_MARKS}]")


class Located(NamedTuple):
    """Token i stands for text[starts[i]:ends[i]]; int32 [n] each."""

    tokens: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


def locate(text: str, encode: Callable[[str], np.ndarray]) -> Located:
    """The tokens of a text, word by word; every token has the offsets of its whole word.

    A word is a run of letters and digits, a single Chinese or Japanese character, or a single
    punctuation mark. Whitespace between two words counts as one space.
    """
    parts: list[np.ndarray] = []
    starts, ends = [], []
    before, previous = "", 0
    for word in _WORD.finditer(text):
        gap = " " if word.start() > previous else ""
        parts.append(_encode_after(before, gap + word.group(), encode))
        before, previous = word.group()[-1], word.end()
        starts.append(word.start())
        ends.append(previous)
    sizes = [len(part) for part in parts]
    return Located(
        np.concatenate([np.zeros(0, np.int32), *parts]),
        np.repeat(np.asarray(starts, np.int32), sizes),
        np.repeat(np.asarray(ends, np.int32), sizes),
    )


def _encode_after(before: str, text: str, encode: Callable[[str], np.ndarray]) -> np.ndarray:
    """The tokens that `text` adds to those of the character before it.

    So a vocabulary that marks the start of a word (T5's, ALBERT's) does not mark every comma. A
    text that merges with the character, or that becomes one unknown word with it, stands alone.
    """
    head, whole = encode(before), encode(before + text)
    if len(whole) > len(head) and (whole[: len(head)] == head).all():
        return whole[len(head) :]
    return encode(text)
