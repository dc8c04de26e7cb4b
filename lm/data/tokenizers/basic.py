"""Tokenizers `byte`, `char` and `words`, which need no package; word starts of any tokenizer."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np

from lm.data.files import find_file
from lm.data.tokenizer import Tokenizer
from lm.errors import UserError
from lm.storage import parse_json

EOS, UNKNOWN = "<eos>", "<unk>"
_ENTRY = re.compile(r"\s*(\S+)(?:\s+([0-9]+))?\s*")


@dataclass(frozen=True)
class ByteTokenizer(Tokenizer):
    """Tokenizer of UTF-8 bytes; id 256 delimits documents."""

    kind: ClassVar[str] = "byte"
    vocab_size: ClassVar[int] = 257
    bos_id: ClassVar[int] = 256
    eos_id: ClassVar[int] = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in map(int, ids) if i < 256).decode(errors="replace")

    def files(self) -> dict[str, bytes]:
        return {}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Self:
        return cls()


@dataclass(frozen=True)
class CharTokenizer(Tokenizer):
    """Tokenizer of single characters; the alphabet is sorted and has no special ids."""

    alphabet: str
    kind: ClassVar[str] = "char"
    is_fitted: ClassVar[bool] = True

    @classmethod
    def fit(cls, texts: Iterable[str]) -> Self:  # type: ignore[override]
        """Fit to all characters that occur in `texts`."""
        alphabet: set[str] = set()
        for text in texts:
            alphabet.update(text)
        return cls("".join(sorted(alphabet)))

    @property
    def vocab_size(self) -> int:
        return len(self.alphabet)

    @cached_property
    def _code_points(self) -> np.ndarray:
        return _code_points(self.alphabet)

    def encode(self, text: str) -> np.ndarray:
        codes = _code_points(text)
        ids = np.searchsorted(self._code_points, codes).clip(max=self.vocab_size - 1)
        unknown = codes[self._code_points[ids] != codes]
        if len(unknown):
            raise UserError(
                f"character {chr(unknown[0])!r} (U+{unknown[0]:04X}) is not in the alphabet of the "
                "training text: use --config.data.tokenizer=byte or add it to the training text"
            )
        return ids.astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.alphabet[i] for i in ids)

    def token_id(self, name: str) -> int | None:
        return self.alphabet.index(name) if len(name) == 1 and name in self.alphabet else None

    def files(self) -> dict[str, bytes]:
        return {"alphabet.json": json.dumps(self.alphabet).encode()}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Self:
        return cls(parse_json(files["alphabet.json"], "alphabet.json", str))


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


@dataclass(frozen=True)
class WordTokenizer(Tokenizer):
    """Tokenizer of whitespace-separated words; `<eos>` ends a line, `<unk>` is any unknown word.

    There is no bos, and a document's last newline is its eos, so that a text file has its
    published number of tokens (WikiText-2: 2,088,628). Sequences that need a start token use eos.

    Attributes:
        words: vocabulary by id, including `<eos>` and `<unk>`.
        counts: occurrences of each id in the fitted text; 0 if unknown.
        lowercase: lowercase the text.
    """

    words: tuple[str, ...] = field(repr=False)
    counts: tuple[int, ...] = field(repr=False)
    lowercase: bool = False
    kind: ClassVar[str] = "words"
    is_fitted: ClassVar[bool] = True
    fits_sample: ClassVar[bool] = True

    @classmethod
    def from_argument(cls, argument: str, data: Any) -> Self:
        return cls.from_list(find_file(argument, data).read_bytes(), data.lowercase)

    @classmethod
    def fit_settings(cls, data: Any) -> dict[str, Any]:
        return {
            "vocab_size": data.tokenizer_vocab_size,
            "min_count": data.tokenizer_min_count,
            "lowercase": data.lowercase,
        }

    @classmethod
    def fit(  # type: ignore[override]
        cls,
        texts: Iterable[str],
        vocab_size: int | None = None,
        min_count: int = 1,
        lowercase: bool = False,
    ) -> Self:
        """Fit to the most frequent words of `texts`.

        Ids are `<eos>`, `<unk>`, then words by descending frequency, ties alphabetically.

        Args:
            texts: training text.
            vocab_size: maximum number of ids, including both special ones; None for no limit.
            min_count: minimum number of occurrences of a known word.
            lowercase: lowercase the text.
        """
        found: Counter[str] = Counter()
        n_lines = 0
        for text in texts:
            text = text.lower() if lowercase else text
            found.update(text.split())
            n_lines += text.count("\n")
        n_words = found.total()
        del found[EOS], found[UNKNOWN]  # special tokens, even if the text contains them
        frequent = sorted((-count, word) for word, count in found.items() if count >= min_count)
        kept = frequent if vocab_size is None else frequent[: max(vocab_size - 2, 0)]
        n_unknown = n_words + sum(count for count, _ in kept)
        return cls(
            (EOS, UNKNOWN, *(word for _, word in kept)),
            (n_lines, n_unknown, *(-count for count, _ in kept)),
            lowercase,
        )

    @classmethod
    def from_list(cls, content: bytes, lowercase: bool = False) -> Self:
        """Build the tokenizer from a word list.

        Args:
            content: UTF-8 text with one "word" or "word count" per line, in order of ids. `<eos>`
                and `<unk>` are prepended if the list lacks them.
            lowercase: lowercase the text.

        Raises:
            UserError: a line is neither "word" nor "word count", or a word occurs twice.
        """
        counts: dict[str, int] = {}
        try:
            lines = content.decode().removesuffix("\n").split("\n")
        except UnicodeDecodeError as error:
            raise UserError(f"not UTF-8 at byte {error.start}") from error
        for number, line in enumerate(lines, start=1):
            entry = _ENTRY.fullmatch(line)
            if not entry:
                raise UserError(f"line {number} is neither a word nor a word and its count")
            word, count = entry.groups("0")
            if word in counts:
                raise UserError(f"line {number}: the word {word!r} occurs twice")
            counts[word] = int(count)
        counts = {word: 0 for word in (EOS, UNKNOWN) if word not in counts} | counts
        return cls(tuple(counts), tuple(counts.values()), lowercase)

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    @cached_property
    def eos_id(self) -> int:  # type: ignore[override]
        return self.words.index(EOS)

    @cached_property
    def unknown_id(self) -> int:
        """Id of unknown words."""
        return self.words.index(UNKNOWN)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words) if word != EOS}

    def encode(self, text: str) -> np.ndarray:
        """Tokenize a text to int32 ids [n]; unlike in other tokenizers, newlines become eos."""
        ids, unknown = self._ids, self.unknown_id
        found: list[int] = []
        for line in (text.lower() if self.lowercase else text).split("\n"):
            found += [ids.get(word, unknown) for word in line.split()]
            found.append(self.eos_id)
        return np.asarray(found[:-1], np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        text = " ".join("\n" if i == self.eos_id else self.words[i] for i in ids)
        return text.replace(" \n", "\n").replace("\n ", "\n")

    def token_id(self, name: str) -> int | None:
        return self.eos_id if name == EOS else self._ids.get(name)

    def pieces(self) -> list[str]:
        return list(self.words)

    def files(self) -> dict[str, bytes]:
        lines = (f"{word} {count}\n" for word, count in zip(self.words, self.counts, strict=True))
        settings = {"lowercase": self.lowercase}
        return {"words.txt": "".join(lines).encode(), "words.json": json.dumps(settings).encode()}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Self:
        return cls.from_list(files["words.txt"], **parse_json(files["words.json"], "words.json"))


_SPACES = (" ", "▁", "Ġ")  # plain, SentencePiece, GPT-2
_OTHER_WHITESPACE = ("\n", "\t", "\r", "Ċ", "ĉ", "č")


def word_starts(tokenizer: Tokenizer) -> np.ndarray:
    """Return which ids start a word, bool [vocab_size].

    For WordPiece: entries without "##". Otherwise entries that begin with a space, if there are any
    (SentencePiece, byte-level BPE, bytes, characters); else all.
    """
    pieces = tokenizer.pieces()
    is_continuation = np.array([piece.startswith("##") for piece in pieces])
    after_space = np.array([piece.startswith(_SPACES) for piece in pieces])
    if is_continuation.sum() > after_space.sum():
        return ~is_continuation
    if not after_space.any():
        return ~after_space
    return after_space | [piece.startswith(_OTHER_WHITESPACE) for piece in pieces]
