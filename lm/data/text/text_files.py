"""Sources `text` and `jsonl`: the user's own files of text and of JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from lm.data.files import find_files, hash_files, read_lines, read_text
from lm.data.records.records import RowFiles, read_jsonl_rows
from lm.data.sources import Chunk, DocumentSource, Row, cut_document
from lm.errors import UserError


class TextFiles(DocumentSource):
    """Text files, plain or .gz.

    A document is a whole file (`data.documents` "file") or each line that is not blank ("line").
    """

    def __init__(self, argument: str, data: Any, split: str):
        self.name = f"text:{argument}"
        self.files = find_files(argument, data)
        self.documents = data.documents

    @cached_property
    def digest(self) -> str:
        return hash_files(self.files, "text", self.documents)

    @property
    def size(self) -> int | None:  # type: ignore[override]
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


class JsonLines(DocumentSource, RowFiles):
    """Files with one JSON object a line: a document in `data.field`, or a record."""

    same_columns = False
    kind = "jsonl"

    def __init__(self, argument: str, data: Any, split: str):
        RowFiles.__init__(self, argument, data, split)
        self.field = data.field

    @cached_property
    def digest(self) -> str:
        return hash_files((path for (path,) in self.files), "jsonl", self.field)

    def rows(self) -> Iterator[Row]:
        for (path,) in self.files:
            yield from read_jsonl_rows(path)

    def chunks(self) -> Iterator[Chunk]:
        for (path,) in self.files:
            for number, line in enumerate(read_lines(path), start=1):
                if line.strip():
                    yield from cut_document([self._text(line, f"{path}:{number}")])

    def _text(self, line: str, where: str) -> str:
        """Return the document of a line at FILE:LINE."""
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
    r"""Replace half surrogate pairs, which JSON can escape ("\ud83d"), by U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
