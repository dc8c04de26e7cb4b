"""Tokenizers `byte` and `char`: bytes, and the characters of a text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self

import numpy as np

from lm.data.tokenizer import Tokenizer
from lm.errors import UserError
from lm.storage import parse_json


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
    """Tokenizer of the characters of an alphabet, in sorted order; no special ids."""

    alphabet: str
    kind: ClassVar[str] = "char"
    is_fitted: ClassVar[bool] = True

    @classmethod
    def fit(cls, texts: Iterable[str]) -> Self:  # type: ignore[override]
        """Return the tokenizer of all characters that occur in `texts`."""
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
