"""Text sources: the interface that a source implements, and lookup by name.

`--config.data.source` is a list of NAME or NAME:ARGUMENT, where NAME is a class in the registry
SOURCES that derives from `DocumentSource` (documents for pretraining), `RecordSource` (records of a
task), or both. To add your own class, in a file that your experiment file imports:

    @SOURCES.register("orc")
    class Orc(DocumentSource):
        forms = ("orc:PATH",)

        def __init__(self, argument, data, split):
            self.name, self.column = f"orc:{argument}", data.field
            self.files = find_files(argument, data)

        @cached_property
        def digest(self):
            return hash_files(self.files, "orc", self.column)

        def chunks(self):
            for path in self.files:
                for text in read_column(path, self.column):
                    yield from cut_document([text])

A large source is read part by part (`parts`), each in a worker process; other sources are read in
the main process, which sends chunks of text to the workers.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

from lm.config.registries import SOURCES
from lm.config.rules import spec_problem
from lm.errors import UserError

CHUNK = 2**20  # characters
LONGEST_CHUNK = 4 * CHUNK

# Tokenizers never merge across a single newline between two words, so splitting there does not
# change tokens. A document without one within LONGEST_CHUNK is split at any newline.
_BEST_CUT = re.compile(r"(?<=\S)\n(?=\S)")


class Chunk(NamedTuple):
    """Contiguous piece of a document; `first` and `last` mark the document's ends."""

    text: str
    first: bool
    last: bool


class Part(Protocol):
    """Documents in a fixed order, as chunks, so that huge files stream in bounded memory.

    Worker processes receive a part pickled. Its file, if it has one, is its attribute `path`.
    """

    @property
    def name(self) -> str:
        """Name for messages and manifests; for a source, as in the configuration."""

    @property
    def size(self) -> int | None:
        """Bytes to read, for progress bars and load balancing; None if unknown."""

    def chunks(self) -> Iterator[Chunk]:
        """Yield the non-empty documents in order. See `cut_document`."""


class Corpus(Part, Protocol):
    """Source of documents, or its training or validation side."""

    @property
    def digest(self) -> str:
        """sha256 of everything that determines the documents: contents, order and settings."""


class Row(NamedTuple):
    """Row of a record file.

    Attributes:
        where: place for messages, FILE:LINE.
        values: values by column name.
        problem: description of an invalid row, or "".
    """

    where: object
    values: dict[str, Any]
    problem: str = ""


class _Source(ABC):
    """Base class of document and record sources.

    Attributes:
        forms: configuration values, such as ("orc:PATH",), for messages and validation; () for any.
            Only for plug-ins: the registry has those of library sources.
        holds: "documents", "records" or both, set by each class.
        name: name as in the configuration, for messages and manifests; set by `__init__`.
    """

    forms: ClassVar[tuple[str, ...]] = ()
    holds: ClassVar[tuple[str, ...]] = ()
    name: str

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        methods = {"documents": "chunks", "records": "rows"}
        cls.holds = tuple(kind for kind, method in methods.items() if hasattr(cls, method))

    @abstractmethod
    def __init__(self, argument: str, data: Any, split: str):
        """Open a source.

        Args:
            argument: text after "NAME:".
            data: section `data` of the configuration, with the source's options.
            split: "train" or "validation". A source without its own validation split is opened as
                "train" and split afterwards.

        Raises:
            UserError: the source does not exist.
        """

    @classmethod
    def has_validation_split(cls, argument: str, data: Any) -> bool:
        """Return whether the source has its own validation split."""
        return False

    @property
    @abstractmethod
    def digest(self) -> str:
        """sha256 of everything that determines the content; see `file_digests.hash_files`."""


class DocumentSource(_Source):
    """Source of documents; a `Corpus`."""

    size: int | None = None

    def parts(self) -> Sequence[Part]:
        """Return parts that together, in order, have the documents of the source.

        Several processes tokenize parts in parallel; part names and sizes depend only on the files.
        """
        return (self,)

    @abstractmethod
    def chunks(self) -> Iterator[Chunk]:
        """Yield documents in a fixed order, each by `yield from cut_document([text])`."""


class RecordSource(_Source):
    """Source of records: rows of columns, checked and renamed by `records.Records`.

    Attributes:
        known_columns: possible record columns, set before rows are read; (): any.
    """

    same_columns: ClassVar[bool] = True  # all rows have the same columns (not so in JSON lines)
    known_columns: tuple[str, ...] = ()
    has_answers: ClassVar[bool] = False  # rows are complete records of span QA, as in SQuAD

    @abstractmethod
    def rows(self) -> Iterator[Row]:
        """Yield the rows in a fixed order, including invalid ones."""

    def digest_with(self, settings: str) -> str:
        """Return the sha256 of the content and of the settings that records depend on."""
        return hashlib.sha256(repr((self.digest, settings)).encode()).hexdigest()


def find_source(spec: str, kind: str) -> tuple[type[Any], str]:
    """Find the class of a source.

    Args:
        spec: NAME or NAME:ARGUMENT.
        kind: "documents" or "records".

    Returns:
        The class, a DocumentSource or RecordSource, and the argument.

    Raises:
        UserError: the source does not exist, or does not provide this kind.
    """
    if problem := spec_problem(SOURCES, spec, kind):
        raise UserError(problem)
    name, _, argument = spec.partition(":")
    cls = SOURCES[name]
    if not (isinstance(cls, type) and issubclass(cls, _Source)):
        raise UserError(f"data source {name!r}: derive {cls} from DocumentSource or RecordSource")
    return cls, argument


def cut_document(parts: Iterable[str]) -> Iterator[Chunk]:
    """Split a document into chunks of about 2**20 characters.

    The split depends only on the text, not on its division into `parts`. An empty document yields
    nothing.
    """
    rest, first = "", True
    for part in parts:
        rest += part
        while cut := _next_cut(rest):
            yield Chunk(rest[:cut], first, last=False)
            rest, first = rest[cut:], False
    if rest:
        yield Chunk(rest, first, last=True)


def _next_cut(text: str) -> int:
    """Return where to split, or 0 if more text is needed; some text always remains."""
    best = _BEST_CUT.search(text, CHUNK, LONGEST_CHUNK)
    if best:
        return best.end()
    if len(text) <= LONGEST_CHUNK:
        return 0
    newline = text.rfind("\n", CHUNK, LONGEST_CHUNK)
    return newline + 1 if newline >= 0 else LONGEST_CHUNK
