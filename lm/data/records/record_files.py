"""Sources of records in files: TSV, CSV, line-aligned files, SQuAD's JSON; rows of JSON lines.

Every format yields rows as names and values, and a bad row with its problem, so that one policy
applies to the bad rows of all formats.
"""

from __future__ import annotations

import csv
import json
from abc import abstractmethod
from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, ClassVar

from lm.data.files import find_files, hash_files, read_bytes
from lm.data.sources import RecordSource, Row
from lm.errors import UserError


class RowFiles(RecordSource):
    """Files of rows, plain or .gz; PATH may be a glob.

    Attributes:
        files: the files that are read side by side: two of parallel text, else one.
        header: whether the first line of a table names its columns.
    """

    kind: ClassVar[str]  # the name in the registry, part of the digest
    files: tuple[tuple[Path, ...], ...]

    def __init__(self, argument: str, data: Any, split: str):
        self.name, self.header = f"{self.kind}:{argument}", data.header
        self.files = tuple((path,) for path in find_files(argument, data))

    @property
    def digest(self) -> str:
        return self.digest_with("")

    def digest_with(self, settings: str) -> str:
        return hash_files(chain.from_iterable(self.files), "records", self.kind, settings)


class _Tables(RowFiles):
    def rows(self) -> Iterator[Row]:
        for (path,) in self.files:
            yield from _table(path, self._read(path), self.header)

    @staticmethod
    @abstractmethod
    def _read(path: Path) -> Iterator[tuple[int, list[str] | str]]:
        """Yield line number and cells, or the problem with a line."""


class TsvFiles(_Tables):
    """Tab-separated values as GLUE has them: a quote is a character like any other."""

    kind = "tsv"

    @staticmethod
    def _read(path: Path) -> Iterator[tuple[int, list[str] | str]]:
        for number, line in _numbered(path):
            if line.strip("\r"):
                *cells, last = line.split("\t")
                yield number, [*cells, last.removesuffix("\r")]


class CsvFiles(_Tables):
    """Comma-separated values, quoted where they hold commas, quotes or newlines."""

    kind = "csv"

    @staticmethod
    def _read(path: Path) -> Iterator[tuple[int, list[str] | str]]:
        return _parse_csv(path)


class ParallelFiles(RowFiles):
    """Line-aligned files: line n of the first is "source" and of the second "target" of row n."""

    kind = "parallel"

    def __init__(self, argument: str, data: Any, split: str):
        self.name, patterns = f"parallel:{argument}", argument.split("|")
        if len(patterns) != 2:
            raise UserError(f"{self.name!r} must name two paths: parallel:SOURCE_PATH|TARGET_PATH")
        sources, targets = (find_files(pattern, data) for pattern in patterns)
        if len(sources) != len(targets):
            raise UserError(
                f"{self.name}: {len(sources)} source files but {len(targets)} target files"
            )
        self.files = tuple(zip(sources, targets, strict=True))

    def rows(self) -> Iterator[Row]:
        for first, second in self.files:
            yield from _parallel_rows(first, second)


class SquadFiles(RowFiles):
    """Files in the format of SQuAD 1.1 or 2.0: questions, each with its context."""

    kind = "squad"
    has_answers = True

    def rows(self) -> Iterator[Row]:
        for (path,) in self.files:
            yield from _squad_rows(path)


def _parse_csv(path: Path) -> Iterator[tuple[int, list[str] | str]]:
    lines = (f"{line}\n" for _, line in _numbered(path))
    reader = csv.reader(lines, strict=True)  # or an open quote swallows the rest of the file
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, f"not valid CSV ({error})"
        else:
            if cells:
                yield number, cells


def _table(path: Path, rows: Iterator[tuple[int, list[str] | str]], header: bool) -> Iterator[Row]:
    """Yield rows with the names of the header line, or "0", "1", … by position."""
    names: list[str] = []
    if header:
        _, first = next(rows, (1, ""))
        if isinstance(first, str):
            raise UserError(
                f"{path}:1: {first or 'no header line'}: set --config.data.header=False"
            )
        names = [name.strip() for name in first]
        if len(set(names)) < len(names):
            raise UserError(f"{path}:1: two columns have the same name ({', '.join(names)})")
    for number, cells in rows:
        where = f"{path}:{number}"
        if isinstance(cells, str):
            yield Row(where, {}, cells)
            continue
        names = names or [str(i) for i in range(len(cells))]
        if len(cells) == len(names):
            yield Row(where, dict(zip(names, cells, strict=True)))
        else:
            yield Row(where, {}, f"{len(cells)} columns instead of {len(names)}")


def read_jsonl_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file with one JSON object a line."""
    for number, line in _numbered(path):
        if line.strip():
            yield _object(f"{path}:{number}", line)


def _object(where: str, line: str) -> Row:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Row(where, {}, f"not valid JSON ({error})")
    if not isinstance(values, dict):
        return Row(where, {}, f"not a JSON object but {type(values).__name__}")
    return Row(where, values)


def _parallel_rows(first: Path, second: Path) -> Iterator[Row]:
    for source, target in zip_longest(_numbered(first), _numbered(second)):
        if source and target:
            values = {"source": source[1].rstrip("\r"), "target": target[1].rstrip("\r")}
            yield Row(f"{first}:{source[0]}", values)
        else:
            longer, shorter, line = (first, second, source) if source else (second, first, target)
            yield Row(f"{longer}:{line[0]}", {}, f"no line of {shorter} goes with it")


def _squad_rows(path: Path) -> Iterator[Row]:
    try:
        articles = json.loads(b"".join(read_bytes(path)))["data"]
        paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
        questions = [
            (paragraph["context"], qa) for paragraph in paragraphs for qa in paragraph["qas"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: not in the format of SQuAD ({reason})") from error
    for number, (context, qa) in enumerate(questions, start=1):
        where = f"{path}: question {number}"
        try:
            answers = [
                {"text": answer["text"], "start": answer["answer_start"]}
                for answer in qa["answers"]
            ]
            values = {"id": qa["id"], "question": qa["question"], "context": context}
            impossible = bool(qa.get("is_impossible", False))
        except (KeyError, TypeError, AttributeError) as error:
            yield Row(where, {}, f"not in the format of SQuAD ({type(error).__name__}: {error})")
        else:
            yield Row(where, {**values, "answers": answers, "is_impossible": impossible})


def _numbered(path: Path) -> Iterator[tuple[int, str]]:
    r"""Yield the lines without their "\n", and their numbers from 1.

    Bytes that are not UTF-8 become lone surrogates, so that only their own row is bad.
    """
    rest, number = b"", 0
    for chunk in read_bytes(path):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            number += 1
            yield number, _decode(line, number)
    if rest:
        yield number + 1, _decode(rest, number + 1)


def _decode(line: bytes, number: int) -> str:
    text = line.decode("utf-8", "surrogateescape")
    return text.removeprefix("\ufeff") if number == 1 else text
