"""Sources of text: the interface that a source implements, and finding the class of a source.

`--config.data.source` is a list of NAME or NAME:ARGUMENT. NAME is a class of the registry SOURCES
that derives from `DocumentSource` (documents to pretrain on), from `RecordSource` (records of a
task), or from both. A class of your own, in a file that your experiment file imports:

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

A large source is read part by part (`parts`), each in a worker process; any other in the main
process only, and worker processes get chunks of text.
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

# Tokenizers never merge across one newline between two words, so cutting there leaves the tokens
# as they are. A document without such a place within LONGEST_CHUNK is cut at any newline.
_BEST_CUT = re.compile(r"(?<=\S)\n(?=\S)")


class Chunk(NamedTuple):
    """Stretch of a document; `first` and `last` mark the document's ends."""

    text: str
    first: bool
    last: bool


class Part(Protocol):
    """Documents in a fixed order, in chunks, so that a huge file streams in bounded memory.

    A part of a source is read by a worker process, which receives it pickled. It names the file
    that it reads as `path`, unless it reads none.
    """

    @property
    def name(self) -> str:
        """Name for messages and manifests; of a source, as in the configuration."""

    @property
    def size(self) -> int | None:
        """Bytes that are read, for progress bars and to divide work; None if unknown."""

    def chunks(self) -> Iterator[Chunk]:
        """Yield the documents in order; none is empty. See `cut_document`."""


class Corpus(Part, Protocol):
    """Source of documents, or one side of it that is trained or validated on."""

    @property
    def digest(self) -> str:
        """sha256 of all that determines the documents: contents, order and settings."""


class Row(NamedTuple):
    """Row of a file of records.

    Attributes:
        where: place for messages, FILE:LINE.
        values: values by name of the column.
        problem: what is wrong with the row; "" if nothing is.
    """

    where: object
    values: dict[str, Any]
    problem: str = ""


class _Source(ABC):
    """Base of both kinds of sources.

    Attributes:
        forms: how a configuration writes the source, such as ("orc:PATH",), for messages and
            validation; () for any. Plug-ins only: the registry has those of the library.
        holds: "documents", "records" or both, set for each class.
        name: source as the configuration names it, for messages and manifests; set by `__init__`.
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
            data: section `data` of the configuration, with the options of the source.
            split: "train" or "validation". A source without a validation split of its own is
                opened as "train" and divided afterwards.

        Raises:
            UserError: the source does not exist.
        """

    @classmethod
    def has_validation_split(cls, argument: str, data: Any) -> bool:
        """Return whether the source has a validation split of its own."""
        return False

    @property
    @abstractmethod
    def digest(self) -> str:
        """sha256 of all that determines the content, such as `file_digests.hash_files` returns."""


class DocumentSource(_Source):
    """Source of documents, a `Corpus`."""

    size: int | None = None

    def parts(self) -> Sequence[Part]:
        """Return parts whose documents, one part after the other, are those of the source.

        What several processes tokenize at once; their names and sizes depend on the files alone.
        """
        return (self,)

    @abstractmethod
    def chunks(self) -> Iterator[Chunk]:
        """Yield the documents in a fixed order: `yield from cut_document([text])` for each."""


class RecordSource(_Source):
    """Source of records: rows of columns, which `records.Records` checks and renames.

    Attributes:
        known_columns: columns that the records may have, set before rows are read; (): any.
    """

    same_columns: ClassVar[bool] = True  # all rows have the same columns, unlike in JSON lines
    known_columns: tuple[str, ...] = ()
    has_answers: ClassVar[bool] = False  # rows are whole records of span QA, as in SQuAD

    @abstractmethod
    def rows(self) -> Iterator[Row]:
        """Yield the rows in a fixed order, those with a problem too."""

    def digest_with(self, settings: str) -> str:
        """Return the sha256 of the content and of the settings that records depend on."""
        return hashlib.sha256(repr((self.digest, settings)).encode()).hexdigest()


def find_source(spec: str, kind: str) -> tuple[type[Any], str]:
    """Find the class that a source names.

    Args:
        spec: NAME or NAME:ARGUMENT.
        kind: "documents" or "records".

    Returns:
        The class, a DocumentSource or RecordSource, and the argument.

    Raises:
        UserError: there is no such source, or it does not hold the kind.
    """
    if problem := spec_problem(SOURCES, spec, kind):
        raise UserError(problem)
    name, _, argument = spec.partition(":")
    cls = SOURCES[name]
    if not (isinstance(cls, type) and issubclass(cls, _Source)):
        raise UserError(f"data source {name!r}: derive {cls} from DocumentSource or RecordSource")
    return cls, argument


def cut_document(parts: Iterable[str]) -> Iterator[Chunk]:
    """Cut one document into chunks of about 2**20 characters.

    The cuts depend on the text alone, not on how it is divided into `parts`. An empty document
    yields nothing.
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
    """Return where to cut, or 0 if more text is needed; text always remains after the cut."""
    best = _BEST_CUT.search(text, CHUNK, LONGEST_CHUNK)
    if best:
        return best.end()
    if len(text) <= LONGEST_CHUNK:
        return 0
    newline = text.rfind("\n", CHUNK, LONGEST_CHUNK)
    return newline + 1 if newline >= 0 else LONGEST_CHUNK
