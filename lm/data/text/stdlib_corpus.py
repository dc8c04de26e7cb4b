"""Source `stdlib`: source code of Python's standard library, available on every machine."""

from __future__ import annotations

import hashlib
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from lm.data.sources import Chunk, DocumentSource, cut_document

VALIDATION_FRACTION = 0.05
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class StandardLibrary(DocumentSource):
    """Modules of the standard library except its tests, one document each.

    Split "validation" holds the 5 % of files selected by a hash of their path.
    """

    name = "stdlib"

    def __init__(self, argument: str, data: Any, split: str):
        self.split = split

    @classmethod
    def has_validation_split(cls, argument: str, data: Any) -> bool:
        return True

    @cached_property
    def _modules(self) -> tuple[str, ...]:
        validation = self.split == "validation"
        root = Path(sysconfig.get_path("stdlib"))
        modules = []
        for folder, subfolders, files in os.walk(root):
            subfolders[:] = [name for name in subfolders if name not in _NOT_LIBRARY]
            relative = Path(folder).relative_to(root)
            modules += [(relative / name).as_posix() for name in files if name.endswith(".py")]
        return tuple(name for name in sorted(modules) if _is_validation(name) == validation)

    @cached_property
    def digest(self) -> str:
        total = hashlib.sha256(b"stdlib")
        for name, text in self._documents():
            content = hashlib.sha256(text.encode()).hexdigest()
            total.update(f"{name}\0{content}\n".encode())
        return total.hexdigest()

    @cached_property
    def size(self) -> int | None:  # type: ignore[override]
        root = Path(sysconfig.get_path("stdlib"))
        return sum((root / name).stat().st_size for name in self._modules)

    def chunks(self) -> Iterator[Chunk]:
        for _, text in self._documents():
            yield from cut_document([text])

    def _documents(self) -> Iterator[tuple[str, str]]:
        root = Path(sysconfig.get_path("stdlib"))
        for name in self._modules:
            with tokenize.open(root / name) as file:
                yield name, file.read()


def _is_validation(name: str) -> bool:
    """Return whether a module is in the validation split."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) < VALIDATION_FRACTION * 2**32
