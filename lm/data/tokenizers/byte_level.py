"""Byte-level BPE with tiktoken: several times faster than `tokenizers`, with identical ids.

`tokenizers` merges the adjacent pair that comes first in the merge list, tiktoken the pair whose
concatenation has the lowest rank. They agree if

- merges that produce the same token are consecutive, so that ranks can follow their order, and
- every token with a rank is the result of merging its own bytes.

Then no merge crosses the boundary of a token under construction: its bytes merge as they would in
isolation. Hence tiktoken meets two parts of a token only where `tokenizers` does, as the last two
parts of its bytes, and that pair is in the list. Both conditions are checked. Texts are split into
words by the same regular expressions, with two changes. Character classes are spelled out as in
`tokenizers`, because the packages may use different Unicode versions. And there is no look-ahead,
without which Rust's regex engine is twice as fast and needs no stack for long runs of white space:
where the last white space of a run belongs to the next word, a marker character is inserted, whose
tokens are dropped. A second marker joins the texts of a batch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain, groupby, pairwise
from typing import Any

import numpy as np

# Word patterns. GPT-2 (Radford 2019), as in the pre-tokenizer ByteLevel:
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Llama 3 (Llama Team 2024), as OpenAI's cl100k:
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen 2 (Qwen team 2024): single digits.
QWEN_WORDS = LLAMA3_WORDS.replace("{1,3}", "")
# OpenAI's o200k, used by gpt-oss: words also end before upper case.
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_WORDS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_ENDINGS}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_ENDINGS}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_KNOWN = (LLAMA3_WORDS, QWEN_WORDS, O200K_WORDS)

_MARK, _BORDER = _MARKS = "\x10\x11"  # before the last white space; between two texts
_AHEAD = r"|\s+(?!\S)|\s+"  # pattern suffix: white space except the last before a word
_BRACKETS_OR_CLASS = re.compile(r"\[[^\]]+\]|\\p\{[A-Z][a-z]?\}|\\s")
_CLASS = re.compile(r"\\p\{[A-Z][a-z]?\}|\\s")
# Unicode planes without private-use characters and surrogates.
_PLANES = (range(0xD800), range(0xE000, 0x40000), range(0xE0000, 0xF0000))
_PROBE = (
    "It's I'LL we'Ve 'ſ  a   b\n\n \t\r\n x\u00a0y\u2028z\u0085 12345 ½²٣ ǅ漢字かな कि e\u0301 "
    "👩\u200d👩\u200d👧 \0\x1f --!?//\r\n/\n  \u3000  \U0001e030\u0378\U0003fffe end   "
)


@dataclass(frozen=True)
class TiktokenEncoder:
    """Encoder with the same ids as a tokenizer.

    Attributes:
        tokenizer: a `tokenizers.Tokenizer`.
        encoding: tiktoken encoding of marked texts to ranks.
        ids: id of each rank.
        normalize: text normalization.
        names: texts that contain one of these are left to the tokenizer.
        is_space: whether a code point is white space.
        is_last: whether this white space, at the end of a run, may belong to the next word.
    """

    tokenizer: Any
    encoding: Any
    ids: np.ndarray
    normalize: Callable[[str], str]
    names: tuple[str, ...]
    is_space: np.ndarray
    is_last: np.ndarray

    def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]:
        """Return the ids of each text, int32."""
        normal: list[str] = []
        left: dict[int, np.ndarray] = {}
        for at, text in enumerate(texts):
            normal.append(text if text.isascii() else self.normalize(text))
            if any(name in text or name in normal[at] for name in self.names):
                ids = self.tokenizer.encode(text, add_special_tokens=False).ids
                left[at], normal[at] = np.asarray(ids, np.int32), ""
        found = self._encode(normal) if normal else []
        return [left.get(at, ids) for at, ids in enumerate(found)] if left else found

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        joined = _BORDER.join(texts)
        code, dtype = ("ascii", np.uint8) if joined.isascii() else ("utf-32-le", np.uint32)
        characters = np.frombuffer(joined.encode(code), dtype)
        is_space = self.is_space[characters]
        is_word = ~is_space & (characters != ord(_BORDER))
        before_last = is_space[:-2] & self.is_last[characters[1:-1]] & is_word[2:]
        marked = np.insert(characters, np.flatnonzero(before_last) + 1, ord(_MARK))
        ranks = self.encoding.encode_to_numpy(marked.tobytes().decode(code), disallowed_special=())
        mark, border = (self.encoding.encode_single_token(letter) for letter in _MARKS)
        ranks = ranks[ranks != mark]
        ends = [*np.flatnonzero(ranks == border).tolist(), len(ranks)]
        ids = self.ids[ranks]
        return [ids[start + 1 : end] for start, end in pairwise([-1, *ends])]


def tiktoken_encoder(tokenizer: Any, byte_characters: list[str]) -> TiktokenEncoder | None:
    """Build a tiktoken encoder equivalent to a tokenizer.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        byte_characters: character that represents each byte in its vocabulary.

    Returns:
        The encoder; None if the tokenizer is not supported, or tiktoken is not installed.
    """
    try:
        import tiktoken
    except ImportError:
        return None
    stated = json.loads(tokenizer.to_str())
    words = word_pattern(stated["pre_tokenizer"])
    if words is None or stated["normalizer"] not in (None, {"type": "NFC"}):
        return None
    ranks, ids = _ranks(stated["model"], byte_characters)
    if not ranks:
        return None
    is_matched = [
        token["content"]
        for token in stated["added_tokens"]
        if not (token["special"] and tokenizer.encode_special_tokens)
    ]
    normalize = tokenizer.normalizer.normalize_str if stated["normalizer"] else str
    is_space = np.zeros(0x110000, bool)
    for start, stop in _spans(r"\s"):
        is_space[start:stop] = True
    is_last = is_space.copy()
    if r"\s*[\r\n]+" in words:  # white space up to a newline is a separate word
        is_last[[ord("\r"), ord("\n")]] = False
    encoder = TiktokenEncoder(
        tokenizer,
        tiktoken.Encoding(
            "ranks",
            pat_str=_with_marks(words),
            mergeable_ranks=ranks,
            special_tokens={"<|none|>": len(ids)},  # an empty table would match everywhere
        ),
        ids,
        normalize,
        (*_MARKS, *dict.fromkeys([*is_matched, *map(normalize, is_matched)])),
        is_space,
        is_last,
    )
    expected = tokenizer.encode(_PROBE, add_special_tokens=False).ids
    return encoder if encoder.encode_batch([_PROBE])[0].tolist() == expected else None


def word_pattern(pre_tokenizer: Mapping[str, Any] | None) -> str | None:
    """Return the regular expression of a pre-tokenizer's words; None if not supported."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return GPT2_WORDS
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated"} as split,
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        } if not split["invert"]:
            return words if words in _KNOWN else None
    return None


def _with_marks(words: str) -> str:
    """Return the pattern for marked texts, with classes spelled out in brackets."""

    def write(found: re.Match[str]) -> str:
        ranges = _CLASS.sub(lambda kind: _ranges(kind[0]), found[0])
        negated = ranges.startswith("[^")
        return ranges.replace("]", f"{_MARKS}]") if negated else f"[{ranges.strip('[]')}]"

    return _BRACKETS_OR_CLASS.sub(write, words.replace(_AHEAD, rf"|\s+|{_MARK}|{_BORDER}"))


def _ranges(kind: str) -> str:
    """Return a character class spelled out as ranges."""
    return "".join(rf"\x{{{start:X}}}-\x{{{stop - 1:X}}}" for start, stop in _spans(kind))


@cache
def _spans(kind: str) -> list[tuple[int, int]]:
    r"""Return the character ranges of a class such as \p{L} in `tokenizers`."""
    import tokenizers

    kept = tokenizers.pre_tokenizers.Split(tokenizers.Regex(f"{kind}+"), "removed", invert=True)
    return [
        (plane[start], plane[stop - 1] + 1)
        for plane in _PLANES
        for _, (start, stop) in kept.pre_tokenize_str("".join(map(chr, plane)))
    ]


def _ranks(
    model: Mapping[str, Any], byte_characters: list[str]
) -> tuple[dict[bytes, int], np.ndarray]:
    """Return the rank of each token and the id of each rank; empty if not equivalent."""
    import tokenizers

    nothing: dict[bytes, int] = {}
    affixes = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if model["type"] != "BPE" or any(model[name] for name in affixes):
        return nothing, np.zeros(0, np.int32)
    vocabulary, merges = model["vocab"], [tuple(pair) for pair in model["merges"]]
    made = [token for token, _ in groupby(map("".join, merges))]
    if not vocabulary.keys() >= set(byte_characters) or len(made) != len(set(made)):
        return nothing, np.zeros(0, np.int32)
    letters = set(byte_characters)
    whole = vocabulary if model["ignore_merges"] else ()  # words that are taken unsplit
    tokens = dict.fromkeys(chain(byte_characters, made, filter(letters.issuperset, whole)))
    tokens.pop("", None)
    merging = tokenizers.models.BPE(vocabulary, merges)
    reached = {token for token in tokens if merging.tokenize(token)[0].value == token}
    if whole:
        listed = set(merges)
        for token in tokens.keys() - reached:
            cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
            if any(cut not in listed for cut in cuts if tokens.keys() >= set(cut)):
                return nothing, np.zeros(0, np.int32)
        reached = set(tokens)
    byte_of = {letter: byte for byte, letter in enumerate(byte_characters)}
    kept = [token for token in tokens if token in reached]
    ranks = {bytes(map(byte_of.__getitem__, token)): i for i, token in enumerate(kept)}
    return ranks, np.asarray([vocabulary[token] for token in kept], np.int32)
