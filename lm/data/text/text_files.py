"""Corpora of the user's own files: plain text, and JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lm.data.files import hash_files, read_lines, read_text
from lm.data.text.corpus import Chunk, cut_document
from lm.errors import UserError


@dataclass(frozen=True)
class TextFiles:
    """Text files; a document is a whole file, or ("line") each line that is not blank."""

    name: str
    files: tuple[Path, ...]
    documents: str

    @cached_property
    def digest(self) -> str:
        return hash_files(self.files, "text", self.documents)

    @property
    def size(self) -> int | None:
        if any(path.suffix == ".gz" for path in self.files):
            return None
        return sum(path.stat().st_size for path in self.files)

    def chunks(self) -> Iterator[Chunk]:
        for path in self.files:
            if self.documents == "file":
                yield from cut_document(read_text(path))
            else:
                for line in read_lines(path):
                    if line.strip():
                        yield from cut_document([line])


@dataclass(frozen=True)
class JsonLines:
    """Files with one JSON object a line, whose `field` is the document."""

    name: str
    files: tuple[Path, ...]
    field: str

    size = None

    @cached_property
    def digest(self) -> str:
        return hash_files(self.files, "jsonl", self.field)

    def chunks(self) -> Iterator[Chunk]:
        for path in self.files:
            for number, line in enumerate(read_lines(path), start=1):
                if line.strip():
                    yield from cut_document([self._text(line, f"{path}:{number}")])

    def _text(self, line: str, where: str) -> str:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not valid JSON ({error})") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: not a JSON object but {type(record).__name__}")
        if self.field not in record:
            fields = ", ".join(sorted(record)) or "none"
            raise UserError(
                f"{where}: no field {self.field!r} (there are: {fields}): set --config.data.field"
            )
        text = record[self.field]
        if not isinstance(text, str):
            kind = type(text).__name__
            raise UserError(f"{where}: field {self.field!r} is of type {kind}, not a string")
        return _without_lone_surrogates(text)


def _without_lone_surrogates(text: str) -> str:
    r"""JSON can escape half a surrogate pair ("\ud83d"), which is no text; U+FFFD replaces it."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
