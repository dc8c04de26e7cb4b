"""Task records, such as a sentence and its label: rows of files, checked and renamed.

Sources are TSV, CSV, line-aligned texts, SQuAD's JSON, CoNLL's columns, and rows of JSON lines.
Every format yields rows of names and values, or a bad row with its problem, so that one policy
applies to the bad rows of all formats.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib import import_module
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from lm.config.registry import listed, listing
from lm.data.file_digests import hash_files
from lm.data.files import find_files, read_bytes, without_mark
from lm.data.row_documents import MISSING, field_value
from lm.data.sources import Chunk, RecordSource, Row, cut_document, find_source
from lm.errors import UserError
from lm.storage import cache_directory, parse_json

if TYPE_CHECKING:
    from lm.data.record_store import RecordEncoder, RecordStore
    from lm.data.tokenizer import Tokenizer

TEXT_COLUMNS = ("text", "text2", "source", "target", "question", "context", "words")
RECORD_COLUMNS = (*TEXT_COLUMNS, "tags", "label", "id")
# Kinds of records besides `Records`, by the first column that an objective reads.
KINDS: dict[str, str] = {
    "audio": "lm.data.audio.recordings:Recordings",
    "messages": "lm.data.chat.conversations:Conversations",
    "chosen": "lm.data.chat.preference_rows:PairRecords",
    "completion": "lm.data.chat.preference_rows:LabeledRecords",
}

Fields = dict[str, Any]


@dataclass(frozen=True)
class Records:
    """Records of one source, in the order of its rows; iterating reads the source.

    An item is a record, its values by `RECORD_COLUMNS`, and its place, FILE:LINE. A record
    of span QA has id, question, context, answers (a list of {"text", "start"}) and is_impossible.

    Attributes:
        source: source of the rows.
        columns: (record column, source column) pairs; () if they have the same names.
        header: whether tables name their columns, part of the digest.
        labels: class names; () if labels are numbers.
        skip: skip bad rows instead of raising errors.
        multi_label: a label is a list of class names.
        known: record columns that rows of this kind may have.
        synonyms: further names of their columns in a source, the first one in a row counts.
    """

    known: ClassVar[tuple[str, ...]] = RECORD_COLUMNS
    synonyms: ClassVar[Mapping[str, Sequence[str]]] = {}

    source: RecordSource
    columns: tuple[tuple[str, str], ...]
    header: bool
    labels: tuple[str, ...]
    skip: bool
    multi_label: bool = field(default=False, kw_only=True)

    @classmethod
    def of_source(cls, source: RecordSource, data: Any, **more: Any) -> Self:
        """Return the records of a source.

        Args:
            source: source of the rows.
            data: section `data` of the configuration.
            **more: attributes of a derived class.

        Raises:
            UserError: `data.columns` is wrong.
        """
        columns, labels = parse_columns(data.columns, cls.known), tuple(listed(data.labels))
        more |= {"multi_label": data.multi_label}
        return cls(source, columns, data.header, labels, data.bad_rows == "skip", **more)

    @property
    def name(self) -> str:
        return self.source.name

    @cached_property
    def digest(self) -> str:
        """sha256 of the source and all settings that affect the records."""
        return self.source.digest_with(repr(self._settings))

    @property
    def _settings(self) -> tuple[Any, ...]:
        several = (True,) if self.multi_label else ()
        return self.columns, self.header, self.labels, self.skip, *several

    def build_store(
        self, source: Records, tokenizer: Tokenizer, data: Any, progress: bool
    ) -> RecordStore:
        """Open the store of these records; see `dataset.build_store`."""
        from lm.data.record_store import build_record_store

        return build_record_store(source, tokenizer, cache_directory(data), progress, data.workers)

    def encoder(self, tokenizer: Tokenizer) -> RecordEncoder | None:
        """Return the encoder of the records; None encodes the text of each column separately."""
        return None

    def texts(self, record: Fields) -> list[str]:
        """Return a record's texts, for fitting a tokenizer."""
        return [record[name] for name in TEXT_COLUMNS if name in record]

    @property
    def record_texts(self) -> RecordTexts:
        """Corpus for fitting a tokenizer."""
        return RecordTexts(self)

    def __iter__(self) -> Iterator[tuple[Fields, str]]:
        return self.read(lambda message: None)

    def read(self, report: Callable[[str], object]) -> Iterator[tuple[Fields, str]]:
        """Yield records and their places.

        Args:
            report: called with a message for every bad row that is skipped.

        Raises:
            UserError: a row is bad and must not be skipped, or there are no records.
        """
        columns, empty = dict(self.columns), True
        for row in self.source.rows():
            if not row.problem:
                columns = columns or self._same_named(row)
            try:
                record = self._record(row, columns)
            except BadRow as bad:
                self.skip_or_raise(f"{row.where}: {bad}", report)
            else:
                yield record, str(row.where)
                empty = False
        if empty:
            raise UserError(f"{self.name} has no usable record")

    def skip_or_raise(self, message: str, report: Callable[[str], object]) -> None:
        """Report a bad row if it may be skipped; otherwise raise UserError."""
        if not self.skip:
            raise UserError(f"{message}: correct it, or set --config.data.bad_rows=skip")
        report(message)

    def _same_named(self, row: Row) -> dict[str, str]:
        """Map the columns of the source that are named like record columns."""
        found = {name: name for name in self.known if name in row.values}
        if not found:
            there = ", ".join(row.values) or "none"
            raise UserError(
                f"{row.where}: no column has a known name (available: {there}): set "
                f"--config.data.columns, such as {self.known[0]}={next(iter(row.values), 'NAME')}"
            )
        return found

    def _record(self, row: Row, columns: dict[str, str]) -> Fields:
        """Return the record of a row; raise BadRow if it is bad."""
        if row.problem:
            raise BadRow(row.problem)
        if self.source.has_answers:
            return _check_answers(row.values)
        record = {}
        for name, column in columns.items():
            value = field_value(row.values, column)
            if value is MISSING:
                problem = f"no column {column!r} (available: {', '.join(row.values) or 'none'})"
                if not self.source.same_columns:
                    raise BadRow(problem)
                raise UserError(f"{row.where}: {problem}: set --config.data.columns")
            several = name == "label" and self.multi_label
            check = self._check_labels if several else partial(_check_value, name)
            record[name] = check(column, value)
        if "label" in record and not self.multi_label:
            record["label"] = self._check_label(record["label"])
        if "words" in record and "context" in record:
            raise BadRow("a record must have either words or a context")
        if "words" in record and "tags" in record:
            words, tags = split_words(record["words"]), split_words(record["tags"])
            if len(words) != len(tags):
                raise BadRow(f"{len(words)} words have {len(tags)} tags")
            record |= {"words": " ".join(words), "tags": " ".join(map(self._check_label, tags))}
        return record

    def _check_labels(self, column: str, value: Any) -> str:
        """Return a list of labels, or a text with commas between them, as such a text."""
        parts = listed(value) if isinstance(value, str) else value
        parts = parts if isinstance(parts, list) else [parts]
        return listing(self._check_label(_check_value("label", column, part)) for part in parts)

    def _check_label(self, text: str) -> str:
        label = text.strip()
        if self.labels and label not in self.labels:
            known = ", ".join(self.labels)
            raise BadRow(f"label {label!r} is not one of --config.data.labels={known}")
        if not self.labels and not _is_number(label):
            raise BadRow(f"label {label!r} is not a number: name the --config.data.labels")
        return label


def split_words(text: str) -> list[str]:
    """Split at ASCII spaces, tabs and line ends, such as words or CoNLL's columns.

    Other white space, such as the no-break space of "10 000", is part of a word.
    """
    return re.findall(r"[^ \t\r\n]+", text)


class BadRow(Exception):
    """Problem with a row."""


def open_records(
    spec: str, data: Any, split: str = "train", columns: Sequence[str] = ("text",)
) -> Records:
    """Open a source of records, such as tsv:PATH.

    The content is checked as it is read.

    Args:
        spec: NAME or NAME:ARGUMENT.
        data: section `data` of the configuration.
        split: "train" or "validation", for a source with its own validation split.
        columns: columns that the objective reads, of which the first determines the kind of
            records (`KINDS`).

    Raises:
        UserError: the source is unknown or missing, or `data.columns` is wrong.
    """
    cls, argument = find_source(spec, "records")
    module, _, name = KINDS.get(columns[0], "").partition(":")
    kind = getattr(import_module(module), name) if module else Records
    source = cls(argument, data, split)
    source.known_columns = (*kind.known, *chain.from_iterable(kind.synonyms.values()))
    return kind.of_source(source, data)


def parse_columns(text: str, known: Sequence[str] = ()) -> tuple[tuple[str, str], ...]:
    """Parse "text=sentence,label=gold" into (record column, source column) pairs.

    Args:
        text: value of `--config.data.columns`.
        known: existing record columns; () for any.

    Raises:
        UserError: it is malformed, or names an unknown column.
    """
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    columns = {name.strip(): column.strip() for name, _, column in pairs}
    if len(columns) < len(pairs) or not all(columns.values()):
        raise UserError(f"--config.data.columns={text}: write NAME=COLUMN, each name once")
    unknown = [name for name in columns if name not in known]
    if known and unknown:
        raise UserError(
            f"--config.data.columns={text}: unknown name {unknown[0]!r} (known: {', '.join(known)})"
        )
    return tuple(columns.items())


def _check_value(name: str, column: str, value: Any) -> str:
    """Return a value as text; raise BadRow for unusable values."""
    if name in ("label", "id") and isinstance(value, int | float):
        value = json.dumps(value)
    if name in ("words", "tags") and isinstance(value, list):
        if not all(isinstance(part, str) and len(split_words(part)) == 1 for part in value):
            raise BadRow(f"{column!r} must contain only words without spaces")
        value = " ".join(value)
    if not isinstance(value, str):
        raise BadRow(f"{column!r} is of type {type(value).__name__}, not a string")
    if not value.strip():
        raise BadRow(f"{column!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # bytes that are not UTF-8, or half an escaped pair
        raise BadRow(f"{column!r} is not UTF-8 at character {error.start}") from error
    return value


def _check_answers(values: Fields) -> Fields:
    """Return a record of span QA; raise BadRow if an answer is not in the context."""
    columns = ("id", "question", "context")
    texts = {name: _check_value(name, name, values[name]) for name in columns}
    context = texts["context"]
    for answer in values["answers"]:
        text, start = answer["text"], answer["start"]
        if not isinstance(text, str) or not isinstance(start, int) or start < 0:
            raise BadRow("an answer is not a text with its answer_start")
        if context[start : start + len(text)] != text:
            raise BadRow(f"the answer {text!r} is not at character {start} of the context")
    if not values["answers"] and not values["is_impossible"]:
        raise BadRow("no answers, and not is_impossible")
    return {**values, **texts}


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


@dataclass(frozen=True)
class RecordTexts:
    """Corpus of record texts, each a document, for fitting a tokenizer."""

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
            for text in self.records.texts(record):
                yield from cut_document([text])


# --- files of records


class RowFiles(RecordSource):
    """Files of rows, plain or compressed; PATH may be a glob.

    Attributes:
        files: the files that are read together: two for parallel text, else one.
        header: whether the first line of a table names its columns.
    """

    kind: ClassVar[str]  # name in the registry, part of the digest
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
            yield from table_rows(path, self.lines(path), self.header)

    @staticmethod
    @abstractmethod
    def lines(path: Path) -> Iterator[tuple[int, list[str] | str]]:
        """Yield line number and cells, or the problem with a line."""


class TsvFiles(_Tables):
    """Tab-separated values as in GLUE: quotes have no special meaning."""

    kind = "tsv"

    @staticmethod
    def lines(path: Path) -> Iterator[tuple[int, list[str] | str]]:
        for number, line in _numbered(path):
            if line.strip("\r"):
                *cells, last = line.split("\t")
                yield number, [*cells, last.removesuffix("\r")]


class CsvFiles(_Tables):
    """Comma-separated values, quoted if they contain commas, quotes or newlines."""

    kind = "csv"

    @staticmethod
    def lines(path: Path) -> Iterator[tuple[int, list[str] | str]]:
        return _parse_csv(path)


class ParallelFiles(RowFiles):
    """Line-aligned files: line n of both is "source" and "target" of row n."""

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


class ConllFiles(RowFiles):
    """CoNLL files: a word per line, with its tag last, and an empty line after each sentence."""

    kind = "conll"

    def rows(self) -> Iterator[Row]:
        for (path,) in self.files:
            yield from _conll_rows(path)


def _parse_csv(path: Path) -> Iterator[tuple[int, list[str] | str]]:
    lines = (f"{line}\n" for _, line in _numbered(path))
    reader = csv.reader(lines, strict=True)  # otherwise an open quote swallows the rest of the file
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


def table_rows(
    path: Path, rows: Iterator[tuple[int, list[str] | str]], header: bool
) -> Iterator[Row]:
    """Yield rows named by the header line, or "0", "1", … by position.

    Args:
        path: the table.
        rows: number and cells of each line, or the problem with it.
        header: whether the first line names the columns.
    """
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
    """Yield the rows of a file with one JSON object per line."""
    return jsonl_rows((f"{path}:{number}", line) for number, line in _numbered(path))


def jsonl_rows(lines: Iterable[tuple[object, str]]) -> Iterator[Row]:
    """Yield the rows of lines with one JSON object each, given with their places."""
    for where, line in lines:
        if line.strip():
            yield _object(where, line)


def _object(where: object, line: str) -> Row:
    try:
        line.encode()
        values = parse_json(line, where, object)
    except UnicodeEncodeError as error:
        return Row(where, {}, f"not UTF-8 at character {error.start}")
    except UserError as error:
        problem = str(error).removeprefix(f"{where}: damaged JSON ")
        return Row(where, {}, f"not valid JSON {problem}")
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
            yield Row(f"{longer}:{line[0]}", {}, f"{shorter} has no line for it")


def _conll_rows(path: Path) -> Iterator[Row]:
    pairs: list[tuple[str, str]] = []
    problem, start = "", 1
    for number, line in chain(_numbered(path), [(0, "")]):
        cells = split_words(line)
        if cells and cells[0] != "-DOCSTART-":
            start = start if pairs or problem else number
            problem = (
                problem if len(cells) > 1 else f"line {number} is not a word followed by a tag"
            )
            pairs.append((cells[0], cells[-1]))
        elif pairs:
            words, tags = (" ".join(column) for column in zip(*pairs, strict=True))
            yield Row(f"{path}:{start}", {"words": words, "tags": tags}, problem)
            pairs, problem = [], ""


def _squad_rows(path: Path) -> Iterator[Row]:
    try:
        articles = parse_json(b"".join(read_bytes(path)), path, object)["data"]
        paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
        questions = [
            (paragraph["context"], qa) for paragraph in paragraphs for qa in paragraph["qas"]
        ]
    except (UserError, KeyError, TypeError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        if not isinstance(error, UserError):
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
            yield number, decode_line(line, number == 1, path)
    if rest:
        yield number + 1, decode_line(rest, number == 0, path)


def decode_line(line: bytes, first: bool, path: Path) -> str:
    """Return the text of a line, the first of its file or another; see `_numbered`."""
    text = line.decode("utf-8", "surrogateescape")
    return without_mark(text, path) if first else text
