"""Sources `parquet` and `arrow`: columnar files, as documents or records.

Files are read in batches; for Parquet, only the required columns. `arrow` reads what
`datasets.save_to_disk` writes (Arrow's stream format) and Arrow's file format.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from lm.data.compression import compression_of
from lm.data.file_digests import file_state, hash_files, require_unchanged
from lm.data.file_parts import RANGE, FilePart, piece_size
from lm.data.files import find_files, is_folder, open_file, resolve_file
from lm.data.records import parse_columns
from lm.data.row_documents import MISSING, RowDocuments, field_value, no_field
from lm.data.sources import Chunk, Part, RecordSource, Row
from lm.errors import UserError, missing_package
from lm.storage import read_json

if TYPE_CHECKING:  # imported at run time only when a table is read
    import pyarrow as pa

_BATCH = 2**24  # approximate bytes per batch
_MOST_ROWS = 2**13
_END_OF_STREAM = (b"\xff\xff\xff\xff\0\0\0\0", b"\0\0\0\0")  # since Arrow 0.15, and before
_QA_COLUMNS = ("id", "question", "context", "answers")  # columns of SQuAD in `datasets`


@dataclass(frozen=True)
class Table:
    """Open table.

    Attributes:
        schema: names and types of all columns.
        batches: batches of some columns; of all columns if a name is not in the schema.
        n_before: number of rows before them in the file.
        groups: metadata of Parquet row groups.
    """

    schema: pa.Schema
    batches: Iterator[pa.RecordBatch]
    n_before: int = 0
    groups: tuple[Any, ...] = ()


class ColumnFiles(RowDocuments, RecordSource):
    """Columnar files: each row is a document in `data.field`, or a record."""

    kind: ClassVar[str]
    row_word = "rows"
    files: tuple[Path, ...]

    def __init__(self, argument: str, data: Any, split: str):
        _require_pyarrow(f"{self.kind}:{argument}")
        self.name, self.columns = f"{self.kind}:{argument}", data.columns
        self.set_field(data)
        self.files = self._find(argument, data, split)

    @staticmethod
    def _find(argument: str, data: Any, split: str) -> tuple[Path, ...]:
        return find_files(argument, data)

    @cached_property
    def digest(self) -> str:
        return hash_files(self.files, self.kind, self.field)

    def digest_with(self, settings: str) -> str:
        return hash_files(self.files, "records", self.kind, settings)

    def chunks(self) -> Iterator[Chunk]:
        for path in self.files:
            yield from self.documents(path)

    def parts(self) -> Sequence[Part]:
        return [FilePart(self.of_file(), path, file_state(path)[2]) for path in self.files]

    def of_file(self, *files: Path) -> ColumnFiles:
        """Return a source of only these files."""
        other = copy(self)
        other.__dict__.pop("digest", None)
        other.files = files
        return other

    def rows(self) -> Iterator[Row]:
        for path in self.files:
            with self._open(path, self._record_columns) as table:
                labels = class_names(table.schema)
                for row in _rows(path, table):
                    yield as_question(row) if self.has_answers else as_named(row, labels)

    def row_parts(self) -> list[Callable[[], Iterator[Row]]]:
        """Return functions that yield the rows of each part, with all columns."""
        return [
            partial(self._all_rows, part.path, getattr(part, "groups", None))
            for part in cast("Sequence[FilePart | RowGroups]", self.parts())
        ]

    def _all_rows(self, path: Path, groups: range | None) -> Iterator[Row]:
        with self._open(path, (), groups) as table:
            yield from _rows(path, table)

    @cached_property
    def has_answers(self) -> bool:  # type: ignore[override]
        """True if rows are questions with answers, in the SQuAD format of `datasets`."""
        return not self.columns and is_qa(self.column_names)

    @cached_property
    def column_names(self) -> list[str]:
        """Column names of the first file."""
        with self._open(self.files[0], ()) as table:
            return list(table.schema.names)

    @property
    def _record_columns(self) -> tuple[str, ...]:
        named = tuple(column for _, column in parse_columns(self.columns))
        known = _QA_COLUMNS if self.has_answers else self.known_columns
        there = set(self.column_names).difference(named)
        return named + tuple(name for name in known if name in there)

    def documents(self, path: Path, groups: range | None = None) -> Iterator[Chunk]:
        """Yield the documents of a file, or of some Parquet row groups."""

        def rows() -> Iterator[Row]:
            with self._open(path, (self.field,), groups) as table:
                missing = not _has_field(table.schema, self.field)
                problem = no_field(self.field, table.schema.names) if missing else ""
                for row in _rows(path, table):
                    yield row._replace(problem=row.problem or problem)

        yield from self.row_documents(path, rows())

    @contextmanager
    def _open(
        self, path: Path, columns: tuple[str, ...], groups: range | None = None
    ) -> Iterator[Table]:
        """Open a file, and convert its errors to UserError."""
        import pyarrow as pa

        if compression_of(path):
            raise UserError(f"{path}: decompress it: {self.kind} files are compressed inside")
        try:
            with open_file(path) as file:
                if not file.seekable():
                    raise UserError(
                        f"{path}: the server does not report its size: download it first"
                    )
                yield self._table(path, file, columns, groups)
            require_unchanged(path)
        except (pa.ArrowException, OSError, ValueError, EOFError, MemoryError) as error:
            problem = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path}: damaged {self.kind} file ({problem})") from error

    @abstractmethod
    def _table(
        self, path: Path, file: Any, columns: tuple[str, ...], groups: range | None
    ) -> Table:
        """Return the table of an open file.

        Args:
            path: path for messages.
            file: open file.
            columns: columns or nested fields to read; () for all.
            groups: row groups to read; None for all.
        """


class ParquetFiles(ColumnFiles):
    """Parquet files; PATH may be a glob."""

    kind = "parquet"

    def parts(self) -> Sequence[Part]:
        parts: list[Part] = []
        files = super().parts()
        piece = piece_size(sum(part.size or 0 for part in files), RANGE)
        for part in files:
            assert isinstance(part, FilePart)
            is_large = part.size > min(2 * piece, RANGE)
            parts += self._group_parts(part, piece) if is_large else [part]
        return parts

    def _group_parts(self, part: FilePart, piece: int) -> Iterator[Part]:
        """Yield parts of a large file: row groups, with small ones merged."""
        with self._open(part.path, (), range(0)) as table:
            sizes = [group.total_byte_size for group in table.groups]
        first, size = 0, 0
        for number, group_size in enumerate(sizes):
            size += group_size
            if size >= piece or number == len(sizes) - 1:
                groups = range(first, number + 1)
                yield RowGroups(self.of_file(), part.path, groups, size)
                first, size = number + 1, 0

    def _table(
        self, path: Path, file: Any, columns: tuple[str, ...], groups: range | None
    ) -> Table:
        import pyarrow.parquet as pq

        # Without pre-buffering and with a small buffer, columns are read page by page.
        options: Any = {"pre_buffer": False, "buffer_size": 2**20}
        table = pq.ParquetFile(file, page_checksum_verification=True, **options)
        schema = table.schema_arrow
        complete = all(_has_field(schema, column) for column in columns)
        chosen = list(columns) if columns and complete else None
        found = tuple(table.metadata.row_group(i) for i in range(table.num_row_groups))
        numbers = range(len(found)) if groups is None else groups

        def batches() -> Iterator[pa.RecordBatch]:
            for number in numbers:
                row_bytes = max(found[number].total_byte_size // max(found[number].num_rows, 1), 1)
                n_rows = min(max(_BATCH // row_bytes, 1), _MOST_ROWS)
                yield from table.iter_batches(n_rows, row_groups=[number], columns=chosen)

        n_before = sum(group.num_rows for group in found[: numbers.start])
        return Table(schema, batches(), n_before, found)


@dataclass(frozen=True)
class RowGroups:
    """Row groups of a large Parquet file, as a part of a source.

    Attributes:
        source: source without its files.
        path: the file.
        groups: row group indices.
        size: uncompressed size in bytes.
    """

    source: ColumnFiles
    path: Path
    groups: range
    size: int

    @property
    def name(self) -> str:
        return f"{self.path.name}[row groups {self.groups.start}:{self.groups.stop}]"

    def chunks(self) -> Iterator[Chunk]:
        return self.source.documents(self.path, self.groups)


class ArrowFiles(ColumnFiles):
    """Arrow files, or a folder written by `datasets.save_to_disk`.

    For a folder with several splits, `data.split` and `data.validation_split` are read.
    """

    kind = "arrow"

    @classmethod
    def has_validation_split(cls, argument: str, data: Any) -> bool:
        """Return whether the folder has split `data.validation_split`."""
        folder = resolve_file(argument, data)
        is_dict = (folder / "dataset_dict.json").is_file()
        return is_dict and data.validation_split in _splits(folder)

    @staticmethod
    def _find(argument: str, data: Any, split: str) -> tuple[Path, ...]:
        folder = resolve_file(argument, data)
        if not is_folder(folder):
            return find_files(argument, data)
        if (folder / "dataset_dict.json").is_file():
            name = data.validation_split if split == "validation" else data.split
            if name not in (splits := _splits(folder)):
                known = ", ".join(splits) or "none"
                raise UserError(f"arrow:{argument}: no split {name!r} (available: {known})")
            folder = folder / name
        return _saved_files(folder)

    def _table(
        self, path: Path, file: Any, columns: tuple[str, ...], groups: range | None
    ) -> Table:
        import pyarrow as pa

        is_file_format = file.peek(6)[:6] == b"ARROW1"
        if is_file_format:
            reader = pa.ipc.open_file(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            file.seek(max(file.seek(0, 2) - 8, 0))
            if not file.read(8).endswith(_END_OF_STREAM):
                raise ValueError("it is truncated, or not an Arrow stream")
            file.seek(0)
            reader = pa.ipc.open_stream(file)
            batches = iter(reader)
        names = {column.partition(".")[0] for column in columns} | {*columns}
        chosen = [name for name in reader.schema.names if name in names]
        if not chosen or not all(_has_field(reader.schema, column) for column in columns):
            return Table(reader.schema, batches)
        return Table(reader.schema, (batch.select(chosen) for batch in batches))


def _splits(folder: Path) -> list[str]:
    splits = read_json(folder / "dataset_dict.json").get("splits")
    return [str(name) for name in splits] if isinstance(splits, list) else []


def _saved_files(folder: Path) -> tuple[Path, ...]:
    """Return the files of a data set written by `save_to_disk`, in order."""
    try:
        state = read_json(folder / "state.json")
    except FileNotFoundError:
        raise UserError(
            f"{folder}: not a folder written by datasets.save_to_disk: name its files, "
            "such as arrow:FOLDER/*.arrow"
        ) from None
    listed = state.get("_data_files")
    entries = listed if isinstance(listed, list) else []
    names = [str(entry.get("filename")) for entry in entries if isinstance(entry, dict)]
    if not names or not all(Path(name).name == name for name in names):
        raise UserError(f"{folder / 'state.json'}: names no files in _data_files")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise UserError(f"{folder}: rows are chosen by indices: save it after flatten_indices()")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"{folder / missing[0]}: missing, although state.json names it")
    return tuple(folder / name for name in names)


def _require_pyarrow(purpose: str) -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise missing_package(purpose, "pyarrow", "parquet") from error


def _has_field(schema: pa.Schema, field: str) -> bool:
    """Return whether a schema has a field, possibly nested (`field_value`)."""
    return field_value({one.name: _shape(one.type) for one in schema}, field) is not MISSING


def _shape(kind: pa.DataType) -> Any:
    """Return the field names of a nested type as nested dictionaries; () for other types."""
    import pyarrow as pa

    if not pa.types.is_struct(kind):
        return ()
    return {kind.field(i).name: _shape(kind.field(i).type) for i in range(kind.num_fields)}


def _rows(path: Path, table: Table) -> Iterator[Row]:
    """Yield rows as Python values, numbered from 1 in the file."""
    number = table.n_before
    for batch in table.batches:
        for column in batch.columns:
            _require_sound(column)
        try:
            found: list[Any] = batch.to_pylist()
        except UnicodeDecodeError:
            found = [_row_or_problem(batch.slice(i, 1)) for i in range(batch.num_rows)]
        for values in found:
            number += 1
            where = f"{path}: row {number}"
            yield Row(where, {}, values) if isinstance(values, str) else Row(where, values)


def _require_sound(column: pa.Array) -> None:
    """Raise ArrowInvalid if reading values could access memory outside the column."""
    import pyarrow as pa

    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error):  # reported or skipped per row instead
            raise


def _row_or_problem(one: pa.RecordBatch) -> dict[str, Any] | str:
    """Return the values of a single-row batch, or a description of what is invalid."""
    try:
        return one.to_pylist()[0]
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {error.start}"


def is_qa(names: Iterable[str]) -> bool:
    """Return whether the columns are those of SQuAD in `datasets`."""
    return set(_QA_COLUMNS) <= set(names)


def as_named(row: Row, labels: dict[str, list[str]]) -> Row:
    """Replace class indices of a row by class names."""
    values = {name: _named(value, labels.get(name)) for name, value in row.values.items()}
    return row._replace(values=values)


def as_question(row: Row) -> Row:
    """Convert a SQuAD row of `datasets` to the form of `records.SquadFiles`."""
    values = row.values
    try:
        answers = [
            {"text": text, "start": start}
            for text, start in zip(
                values["answers"]["text"], values["answers"]["answer_start"], strict=True
            )
        ]
    except (KeyError, TypeError, ValueError) as error:
        return row._replace(problem=row.problem or f"invalid SQuAD answers ({error})")
    return row._replace(values={**values, "answers": answers, "is_impossible": not answers})


def class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Return class names by column, from the metadata that `datasets` writes into files."""
    try:
        noted = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return feature_names(noted)


def feature_names(features: Any) -> dict[str, list[str]]:
    """Return class names by column, from a `datasets` feature description."""
    found = {}
    for column, feature in features.items() if isinstance(features, dict) else ():
        inner = feature.get("feature", feature) if isinstance(feature, dict) else None
        names = inner.get("names") if isinstance(inner, dict) else None
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            found[column] = names
    return found


def _named(value: Any, names: list[str] | None) -> Any:
    """Replace class indices by names; leave other values unchanged."""
    if names is None:
        return value
    if isinstance(value, list):
        return [_named(one, names) for one in value]
    is_class = isinstance(value, int) and 0 <= value < len(names)
    return names[value] if is_class else value
