"""Sources `text` and `jsonl`: the user's own files of text and of JSON lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any

from lm.data.compression import compression_of
from lm.data.file_digests import hash_files
from lm.data.file_parts import Line, LineRange, file_parts
from lm.data.files import find_files, not_utf8, read_lines, read_text, tell_once, without_mark
from lm.data.records import RowFiles, decode_line, jsonl_rows, read_jsonl_rows
from lm.data.sources import Chunk, DocumentSource, Part, Row, cut_document
from lm.errors import UserError


class TextFiles(DocumentSource):
    """Text files, plain or compressed.

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
        if any(map(compression_of, self.files)):
            return None
        return sum(path.stat().st_size for path in self.files)

    def parts(self) -> Sequence[Part]:
        empty = self._with_files()
        read_range = empty.read_range if self.documents == "line" else None
        return file_parts(empty, self.files, read_range)

    def of_file(self, path: Path) -> TextFiles:
        """Return the source of one file alone."""
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
        """Yield the documents of a range of lines."""
        yield from _line_documents(_decode(lines.path, line) for line in lines.lines())


class JsonLines(DocumentSource, RowFiles):
    """Files with one JSON object a line: a document in `data.field`, or a record."""

    same_columns = False
    kind = "jsonl"

    def __init__(self, argument: str, data: Any, split: str):
        RowFiles.__init__(self, argument, data, split)
        self.field, self.skip = data.field, data.bad_rows == "skip"

    @cached_property
    def digest(self) -> str:
        return hash_files((path for (path,) in self.files), "jsonl", self.field)

    def rows(self) -> Iterator[Row]:
        for (path,) in self.files:
            yield from read_jsonl_rows(path)

    def chunks(self) -> Iterator[Chunk]:
        for (path,) in self.files:
            yield from self._row_documents(path, read_jsonl_rows(path))

    def parts(self) -> Sequence[Part]:
        empty = self._with_files()
        return file_parts(empty, (path for (path,) in self.files), empty.read_range)

    def of_file(self, path: Path) -> JsonLines:
        """Return the source of one file alone."""
        return self._with_files(path)

    def _with_files(self, *files: Path) -> JsonLines:
        other = copy(self)
        other.__dict__.pop("digest", None)
        other.files = tuple((path,) for path in files)
        return other

    def read_range(self, lines: LineRange) -> Iterator[Chunk]:
        """Yield the documents of a range of lines."""
        texts = (
            (lines.place_of(line), decode_line(line.content, line.start == 0, lines.path))
            for line in lines.lines()
        )
        rows = jsonl_rows(texts)
        yield from self._row_documents(lines.path, rows)

    def _row_documents(self, path: Path, rows: Iterator[Row]) -> Iterator[Chunk]:
        n_skipped, first = 0, ""
        for row in rows:
            problem = row.problem or self._problem(row.values)
            if not problem:
                text = _without_lone_surrogates(row.values[self.field])
                yield from cut_document([text])
            elif self.skip:
                n_skipped, first = n_skipped + 1, first or f"{row.where}: {problem}"
            else:
                raise UserError(f"{row.where}: {problem}")
        if n_skipped:
            tell_once(f"{n_skipped} bad lines skipped, the first: {first}", path)

    def _problem(self, values: dict[str, Any]) -> str:
        """Return what is wrong with the document of a line, "" if nothing is."""
        if self.field not in values:
            fields = ", ".join(sorted(values)) or "none"
            return f"no field {self.field!r} (there are: {fields}): set --config.data.field"
        if not isinstance(text := values[self.field], str):
            return f"field {self.field!r} is of type {type(text).__name__}, not a string"
        return ""


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


def _without_lone_surrogates(text: str) -> str:
    r"""Replace half surrogate pairs, which JSON can escape ("\ud83d"), by U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
