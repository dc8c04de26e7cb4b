"""What every tokenizer can do."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Self

import numpy as np


class Tokenizer(ABC):
    """Text to token ids and back; an immutable value that its `files` fully describe.

    Worker processes receive it pickled.
    """

    kind: ClassVar[str]

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, specials included."""

    @property
    def bos_id(self) -> int | None:
        """The id that starts a document; None if the vocabulary has none."""
        return None

    @property
    def eos_id(self) -> int | None:
        """The id that ends a document; where it equals `bos_id` it delimits documents."""
        return None

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, int32 [n], without bos and eos; text never encodes to special ids."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bos and eos vanish where the reference implementation drops them."""

    def token_id(self, name: str) -> int | None:
        """The id of a vocabulary entry such as "[MASK]", or None if there is none."""
        return None

    def chunks(self) -> list[str]:
        """What each id is written as, with the marks of its kind of vocabulary (##, ▁, Ġ)."""
        return [self.decode([i]) for i in range(self.vocab_size)]

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """Names and contents of the files that describe this tokenizer."""

    @classmethod
    @abstractmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Self:
        """The tokenizer that `files()` described."""

    @cached_property
    def digest(self) -> str:
        """sha256 of the kind and the files."""
        total = hashlib.sha256(self.kind.encode())
        for name, content in sorted(self.files().items()):
            total.update(name.encode() + hashlib.sha256(content).digest())
        return total.hexdigest()

    def save(self, directory: str | Path) -> None:
        """Writes a self-contained copy; `tokenizers.load_saved` reads it back."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        files = self.files()
        for name, content in files.items():
            (directory / name).write_bytes(content)
        about = {"kind": self.kind, "files": sorted(files), "digest": self.digest}
        (directory / "about.json").write_text(json.dumps(about, indent=2) + "\n")
