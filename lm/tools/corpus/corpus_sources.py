"""Documents of a configuration's sources, in datatrove's form."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from itertools import chain
from typing import Any, NamedTuple

from datatrove.data import Document, DocumentsPipeline
from datatrove.io import get_datafolder
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.readers import CSVReader, JsonlReader, ParquetReader, WarcReader

from lm import config as configs
from lm.config.registries import SOURCES
from lm.data.row_documents import field_value, without_lone_surrogates
from lm.data.sources import Chunk, RecordSource, Row
from lm.errors import UserError

# datatrove's readers for formats that our sources do not support. They skip damaged lines.
DATATROVE = {
    "datatrove-jsonl": JsonlReader,
    "datatrove-parquet": ParquetReader,
    "datatrove-csv": CSVReader,
    "datatrove-warc": WarcReader,
}
# Keys of section `data` that affect how a source is read.
SOURCE_KEYS = ("directory", "field", "documents", "bad_rows", "header", "split")


SOURCE_NAME = "source_name"  # metadata key; "source" may be a column of the source itself


class NamedSource(NamedTuple):
    """Named source, with properties shared by its documents.

    Attributes:
        name: its name in the configuration.
        spec: NAME:ARGUMENT as in `data.source`, or datatrove-…:FOLDER/GLOB.
        license: default license of its documents; "": unknown.
        data: values of SOURCE_KEYS.
    """

    name: str
    spec: str
    license: str = ""
    data: Mapping[str, Any] = {}

    def open(self) -> Any:
        """Open the source, or datatrove's reader.

        Raises:
            UserError: it is unknown or missing.
        """
        kind, _, argument = self.spec.partition(":")
        if kind in DATATROVE:
            folder, _, pattern = argument.rpartition("/")
            options = {"glob_pattern": pattern or None, "text_key": self.settings.field}
            if not get_datafolder(folder).list_files(glob_pattern=pattern or None):
                raise UserError(f"no file matches {argument!r}")
            return DATATROVE[kind](folder, **options)
        if kind not in SOURCES:
            known = f"{', '.join(SOURCES)}, {', '.join(DATATROVE)}"
            raise UserError(f"unknown data source {kind!r} (known: {known})")
        return SOURCES[kind](argument, self.settings, "train")

    @property
    def settings(self) -> Any:
        """Section `data` of a configuration for this source."""
        data = configs.default().data
        data.update(self.data)
        return data

    def n_parts(self) -> int:
        """Return the number of parts that tasks can divide the source into."""
        source = self.open()
        if isinstance(source, PipelineStep):
            return len(source.data_folder.list_files(glob_pattern=source.glob_pattern))
        if isinstance(source, RecordSource):
            return len(_row_parts(source))
        return len(source.parts())

    def digest(self) -> str:
        """Return the digest of the contents; for datatrove's readers, of names and sizes."""
        source = self.open()
        if not isinstance(source, PipelineStep):
            return source.digest
        folder = source.data_folder
        found = folder.list_files(glob_pattern=source.glob_pattern)
        sizes = json.dumps([(name, folder.size(name)) for name in found])
        return hashlib.sha256(sizes.encode()).hexdigest()

    def documents(
        self, rank: int = 0, world_size: int = 1, report: Callable[[str], object] = len
    ) -> Iterator[Document]:
        """Yield the documents of a task.

        Args:
            rank: index of the task.
            world_size: number of tasks.
            report: called with "empty" or "bad" for a row without a document.

        Raises:
            UserError: a file is damaged, or a row has no text.
        """
        source = self.open()
        if isinstance(source, PipelineStep):
            documents = source.run(None, rank, world_size)
        elif isinstance(source, RecordSource):
            row_parts = list(enumerate(_row_parts(source)))[rank::world_size]
            documents = chain.from_iterable(
                _from_rows(rows(), self.settings, f"{self.name}/{n}", report)
                for n, rows in row_parts
            )
        else:
            parts = list(enumerate(source.parts()))[rank::world_size]
            documents = chain.from_iterable(
                _from_chunks(part.chunks(), f"{self.name}/{n}", report) for n, part in parts
            )
        for document in documents:
            named = {"source": self.name, **document.metadata, SOURCE_NAME: self.name}
            document.metadata = named
            if self.license:
                document.metadata.setdefault("license", self.license)
            document.metadata.pop("file_path", None)
            yield document


def _from_chunks(
    chunks: Iterator[Chunk], prefix: str, report: Callable[[str], object]
) -> Iterator[Document]:
    parts: list[str] = []
    for number, chunk in enumerate(chunks):
        parts.append(chunk.text)
        if chunk.last:
            text = "".join(parts)
            parts = []
            if text.strip():
                yield Document(text, f"{prefix}/{number}")
            else:
                report("empty")


def _row_parts(source: Any) -> list[Callable[[], Iterator[Row]]]:
    """Return functions that yield the rows of each part: ranges of large files, files, or all."""
    if hasattr(source, "row_parts"):
        return source.row_parts()
    parts = []
    for file in getattr(source, "files", ()):
        part = copy(source)
        part.files = (file,)
        parts.append(part.rows)
    return parts or [source.rows]


def _from_rows(
    rows: Iterator[Row], data: Any, prefix: str, report: Callable[[str], object]
) -> Iterator[Document]:
    for number, row in enumerate(rows):
        values = {k: v for k, v in row.values.items() if isinstance(v, str | int | float | bool)}
        text, problem = field_value(row.values, data.field), row.problem
        values.pop(data.field, None)
        if problem or not isinstance(text, str):
            there = ", ".join(row.values)
            problem = problem or f"no text in field {data.field!r} (available: {there})"
            if data.bad_rows != "skip":
                raise UserError(f"{row.where}: {problem}: correct it, or set bad_rows to skip")
            report("bad")
            continue
        if not text.strip():
            report("empty")
            continue
        name = str(values.pop("id", f"{prefix}/{number}"))
        yield Document(without_lone_surrogates(text), name, [], values)


class SourceReader(PipelineStep):
    """Reader of all sources; each task reads its share of the parts."""

    type = "📖 - READER"
    name = "sources"

    def __init__(self, sources: tuple[NamedSource, ...]):
        super().__init__()
        self.sources = sources

    def run(
        self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1
    ) -> DocumentsPipeline:
        for source in self.sources:
            yield from source.documents(
                rank, world_size, lambda kind: self.stat_update(f"rows_{kind}")
            )


class StageReader(JsonlReader):
    """Reader of the file that the same task wrote in an earlier stage.

    datatrove's reader divides existing files among tasks: if one task wrote none, the next task
    would get another's, and signatures would refer to the wrong documents.
    """

    def run(
        self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1
    ) -> DocumentsPipeline:
        yield from self.read_files_shard([f"{rank:05d}.jsonl.gz"])
