"""Sources `text` and `jsonl`: text files and JSON lines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

from lm.data.compression import compression_of
from lm.data.file_digests import file_state, hash_files
from lm.data.file_parts import FilePart, Line, LineRange, file_parts
from lm.data.files import find_files, not_utf8, read_lines, read_text, without_mark
from lm.data.records import RowFiles, decode_line, jsonl_rows, read_jsonl_rows
from lm.data.row_documents import RowDocuments
from lm.data.sources import Chunk, DocumentSource, Part, Row, cut_document


class TextFiles(DocumentSource):
    """Text files, plain or compressed.

    A document is a whole file (`data.documents` "file") or each non-blank line ("line").
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
        if any(map(compression_of, self.files)):
            return None
        return sum(file_state(path)[2] for path in self.files)

    def parts(self) -> Sequence[Part]:
        empty = self._with_files()
        read_range = empty.read_range if self.documents == "line" else None
        return file_parts(empty, self.files, read_range)

    def of_file(self, path: Path) -> TextFiles:
        """Return a source of one file."""
        return self._with_files(path)

    def _with_files(self, *files: Path) -> TextFiles:
        other = copy(self)
        other.__dict__.pop("digest", None)
        other.files = files
        return other

    def chunks(self) -> Iterator[Chunk]:
        for path in self.files:
            if self.documents == "file":
                yield from cut_document(read_text(path))
            else:
                yield from _line_documents(read_lines(path))

    def read_range(self, lines: LineRange) -> Iterator[Chunk]:
        """Yield the documents in a range of lines."""
        yield from _line_documents(_decode(lines.path, line) for line in lines.lines())


class JsonLines(RowDocuments, RowFiles):
    """Files with one JSON object per line: a document in `data.field`, or a record."""

    same_columns = False
    kind = "jsonl"

    def __init__(self, argument: str, data: Any, split: str):
        RowFiles.__init__(self, argument, data, split)
        self.set_field(data)

    @cached_property
    def digest(self) -> str:
        return hash_files((path for (path,) in self.files), "jsonl", self.field)

    def rows(self) -> Iterator[Row]:
        for (path,) in self.files:
            yield from read_jsonl_rows(path)

    def chunks(self) -> Iterator[Chunk]:
        for (path,) in self.files:
            yield from self.row_documents(path, read_jsonl_rows(path))

    def parts(self) -> Sequence[Part]:
        empty = self._with_files()
        return file_parts(empty, (path for (path,) in self.files), empty.read_range)

    def row_parts(self) -> list[Callable[[], Iterator[Row]]]:
        """Return functions that yield the rows of each part."""
        return [
            partial(_range_rows, part)
            if isinstance(part, LineRange)
            else partial(read_jsonl_rows, cast(FilePart, part).path)
            for part in self.parts()
        ]

    def of_file(self, path: Path) -> JsonLines:
        """Return a source of one file."""
        return self._with_files(path)

    def _with_files(self, *files: Path) -> JsonLines:
        other = copy(self)
        other.__dict__.pop("digest", None)
        other.files = tuple((path,) for path in files)
        return other

    def read_range(self, lines: LineRange) -> Iterator[Chunk]:
        """Yield the documents in a range of lines."""
        yield from self.row_documents(lines.path, _range_rows(lines))


def _range_rows(lines: LineRange) -> Iterator[Row]:
    texts = (
        (lines.place_of(line), decode_line(line.content, line.start == 0, lines.path))
        for line in lines.lines()
    )
    return jsonl_rows(texts)


def _line_documents(lines: Iterable[str]) -> Iterator[Chunk]:
    for line in lines:
        if line.strip():
            yield from cut_document([line])


def _decode(path: Path, line: Line) -> str:
    try:
        text = line.content.decode().removesuffix("\r")
    except UnicodeDecodeError as error:
        raise not_utf8(path, line.start + error.start) from error
    return text if line.start else without_mark(text, path)
