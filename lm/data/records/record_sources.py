"""Records of a task, such as a sentence and its label, from the user's files."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from lm.data.files import find_files, hash_files
from lm.data.records.record_files import FORMATS, Row
from lm.data.text.corpus import Chunk, Corpus, cut_document
from lm.errors import UserError

TEXT_ROLES = ("text", "text2", "source", "target", "question", "context")
ROLES = (*TEXT_ROLES, "label", "id")

Fields = dict[str, Any]


@dataclass(frozen=True)
class Records:
    """The records of one source, in the order of its files; iterating reads the files.

    An item is the record, a dict of role to str, and where it stands, FILE:LINE. A SQuAD record
    has id, question, context, answers (a list of {"text", "start"}) and is_impossible.

    files: those read side by side together: two for parallel text, else one.
    columns: column names by role; empty if the columns are named as the roles.
    labels: names of the classes; empty if a label is a number.
    """

    name: str
    kind: str
    files: tuple[tuple[Path, ...], ...]
    columns: tuple[tuple[str, str], ...]
    header: bool
    labels: tuple[str, ...]
    skip: bool

    @cached_property
    def digest(self) -> str:
        """sha256 of the files and of all settings that the records depend on."""
        settings = (self.columns, self.header, self.labels, self.skip)
        return hash_files(chain.from_iterable(self.files), "records", self.kind, repr(settings))

    def __iter__(self) -> Iterator[tuple[Fields, str]]:
        return self.read(lambda message: None)

    def read(self, report: Callable[[str], object]) -> Iterator[tuple[Fields, str]]:
        """Yields records and their places; `report` is told of every bad row that is skipped.

        UserError for a bad row that is not to be skipped, and if there is no record at all.
        """
        columns, empty = dict(self.columns), True
        for row in chain.from_iterable(FORMATS[self.kind](f, self.header) for f in self.files):
            if not row.problem:
                columns = columns or _columns_named_as_roles(row)
            try:
                record = self._record(row, columns)
            except _BadRow as bad:
                message = f"{row.where}: {bad}"
                if not self.skip:
                    advice = "correct it, or set --config.data.bad_rows=skip"
                    raise UserError(f"{message}: {advice}") from bad
                report(message)
            else:
                yield record, row.where
                empty = False
        if empty:
            raise UserError(f"{self.name} holds no usable record")

    def _record(self, row: Row, columns: dict[str, str]) -> Fields:
        if row.problem:
            raise _BadRow(row.problem)
        if self.kind == "squad":
            return _checked_squad(row.values)
        record = {}
        for role, column in columns.items():
            if column not in row.values:
                problem = f"no column {column!r} (there are: {', '.join(row.values) or 'none'})"
                if self.kind == "jsonl":
                    raise _BadRow(problem)
                raise UserError(f"{row.where}: {problem}: set --config.data.columns")
            record[role] = _checked(role, column, row.values[column])
        if "label" in record:
            record["label"] = self._checked_label(record["label"])
        return record

    def _checked_label(self, text: str) -> str:
        label = text.strip()
        if self.labels and label not in self.labels:
            known = ", ".join(self.labels)
            raise _BadRow(f"label {label!r} is none of --config.data.labels={known}")
        if not self.labels and not _is_number(label):
            raise _BadRow(f"label {label!r} is not a number: name the --config.data.labels")
        return label


class _BadRow(Exception):
    """What is wrong with a row."""


def read_records(spec: str, data: Any) -> Records:
    """Opens a source of records: tsv:, csv:, jsonl: or squad:PATH, or parallel:SOURCE|TARGET.

    Paths may be globs. UserError for an unknown kind of source, columns that name no role, and
    files that are not there; what is in the files is checked as they are read.
    """
    kind, _, path = spec.partition(":")
    if kind not in FORMATS:
        known = "tsv:PATH, csv:PATH, jsonl:PATH, parallel:SOURCE_PATH|TARGET_PATH, squad:PATH"
        raise UserError(f"{spec!r} is no source of records (known: {known})")
    patterns = path.split("|") if kind == "parallel" else [path]
    if kind == "parallel" and len(patterns) != 2:
        raise UserError(f"{spec!r} must name two paths: parallel:SOURCE_PATH|TARGET_PATH")
    found = [find_files(pattern, data) for pattern in patterns]
    if len({len(files) for files in found}) > 1:
        raise UserError(f"{spec}: {len(found[0])} source files but {len(found[1])} target files")
    labels = tuple(name for part in data.labels.split(",") if (name := part.strip()))
    files = tuple(zip(*found, strict=True))
    return Records(
        spec, kind, files, _columns(data.columns), data.header, labels, data.bad_rows == "skip"
    )


def _columns(text: str) -> tuple[tuple[str, str], ...]:
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    columns = {role.strip(): column.strip() for role, _, column in pairs}
    if len(columns) < len(pairs) or not all(columns.values()):
        raise UserError(f"--config.data.columns={text}: write ROLE=COLUMN, each role once")
    unknown = [role for role in columns if role not in ROLES]
    if unknown:
        raise UserError(
            f"--config.data.columns={text}: unknown role {unknown[0]!r} (known: {', '.join(ROLES)})"
        )
    return tuple(columns.items())


def _columns_named_as_roles(row: Row) -> dict[str, str]:
    found = {role: role for role in ROLES if role in row.values}
    if not found:
        there = ", ".join(row.values) or "none"
        raise UserError(
            f"{row.where}: no column is named as a role (there are: {there}): set "
            f"--config.data.columns, such as text={next(iter(row.values), 'NAME')}"
        )
    return found


def _checked(role: str, column: str, value: Any) -> str:
    if role in ("label", "id") and isinstance(value, int | float):
        value = json.dumps(value)
    if not isinstance(value, str):
        raise _BadRow(f"{column!r} is of type {type(value).__name__}, not a string")
    if not value.strip():
        raise _BadRow(f"{column!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # bytes that are not UTF-8, or half an escaped pair
        raise _BadRow(f"{column!r} is not UTF-8 at character {error.start}") from error
    return value


def _checked_squad(values: Fields) -> Fields:
    texts = {role: _checked(role, role, values[role]) for role in ("id", "question", "context")}
    context = texts["context"]
    for answer in values["answers"]:
        text, start = answer["text"], answer["start"]
        if not isinstance(text, str) or not isinstance(start, int) or start < 0:
            raise _BadRow("an answer is not a text with its answer_start")
        if context[start : start + len(text)] != text:
            raise _BadRow(f"the answer {text!r} is not at character {start} of the context")
    if not values["answers"] and not values["is_impossible"]:
        raise _BadRow("no answers, and not is_impossible")
    return {**values, **texts}


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


@dataclass(frozen=True)
class _TextCorpus:
    records: Records

    size = None

    @property
    def name(self) -> str:
        return self.records.name

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"texts of {self.records.digest}".encode()).hexdigest()

    def chunks(self) -> Iterator[Chunk]:
        for record, _ in self.records:
            for role in TEXT_ROLES:
                if role in record:
                    yield from cut_document([record[role]])


def text_corpus(records: Records) -> Corpus:
    """The texts of all records, each a document, to fit a tokenizer on."""
    return _TextCorpus(records)
