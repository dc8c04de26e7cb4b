"""Parts of file sources for parallel reading: whole files, and ranges of lines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from lm.data.compression import compression_of, refuse_compressed
from lm.data.file_digests import file_state, raw_file
from lm.data.sources import Chunk, Part
from lm.errors import UserError

RANGE = 2**28  # approximate maximum bytes per range
_PIECES = 64  # pieces that the work on a small corpus is divided into
_LEAST = 2**24  # minimum bytes per piece
_BLOCK = 2**24


@dataclass(frozen=True)
class FilePart:
    """File of a source, as a part.

    Attributes:
        source: source whose method `of_file(path)` returns a source of that file only.
        path: the file.
        size: file size in bytes.
    """

    source: Any
    path: Path
    size: int

    @property
    def name(self) -> str:
        return self.path.name

    def chunks(self) -> Iterator[Chunk]:
        return self.source.of_file(self.path).chunks()


class Line(NamedTuple):
    """Line of a file.

    Attributes:
        number: line number in its range, from 1.
        start: byte offset in the file.
        content: bytes without the newline.
    """

    number: int
    start: int
    content: bytes


@dataclass(frozen=True)
class LineRange:
    """Lines that start in a byte range of a file, as a part of a source.

    Attributes:
        read: picklable function that makes chunks from the lines of a range.
        path: the file.
        start: start of the range in bytes.
        stop: end of the range in bytes, exclusive.
    """

    read: Callable[[LineRange], Iterator[Chunk]]
    path: Path
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.path.name}[{self.start}:{self.stop}]"

    @property
    def size(self) -> int:
        return self.stop - self.start

    def chunks(self) -> Iterator[Chunk]:
        return self.read(self)

    def lines(self) -> Iterator[Line]:
        """Yield the lines.

        Raises:
            UserError: the file cannot be read.
        """
        try:
            with raw_file(self.path) as file:
                if not self.start:
                    refuse_compressed(file.peek(512), self.path)
                place = max(self.start - 1, 0)
                file.seek(place)
                if self.start:
                    place += len(file.readline())  # belongs to the previous range
                number = 0
                while place < self.stop and (line := file.readline()):
                    number += 1
                    yield Line(number, place, line.removesuffix(b"\n"))
                    place += len(line)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error

    def place_of(self, line: Line) -> LinePlace:
        """Return the place of a line for messages; its number is counted only when printed."""
        return LinePlace(self, line.number)

    @cached_property
    def n_lines_before(self) -> int:
        """Number of lines in the file before the range."""
        n, left = 0, self.start
        with raw_file(self.path) as file:
            while left and (block := file.read(min(_BLOCK, left))):
                n, left = n + block.count(b"\n"), left - len(block)
            if self.start:
                file.seek(self.start - 1)
                n += file.read(1) != b"\n"  # the range starts inside a line of the previous one
        return n


class LinePlace(NamedTuple):
    """FILE:LINE, formatted lazily."""

    range: LineRange
    number: int

    def __str__(self) -> str:
        return f"{self.range.path}:{self.range.n_lines_before + self.number}"


def piece_size(total: int, most: int) -> int:
    """Return the bytes per piece of work: fewer for a small corpus, to balance the load.

    Args:
        total: bytes of the corpus.
        most: maximum bytes per piece.
    """
    return min(most, max(total // _PIECES, _LEAST))


def file_parts(
    source: Any,
    files: Iterable[Path],
    read_range: Callable[[LineRange], Iterator[Chunk]] | None = None,
) -> list[Part]:
    """Split a file source into parts: whole files, or ranges of large line-based files.

    Args:
        source: source without files (`FilePart.source`).
        files: its files.
        read_range: makes chunks from a range of lines; None if files are not line-based.

    Raises:
        UserError: a file no longer exists.
    """
    parts: list[Part] = []
    sizes: dict[Path, int] = {}
    for path in files:
        try:
            sizes[path] = file_state(path)[2]
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    piece = piece_size(sum(sizes.values()), RANGE)
    for path, size in sizes.items():
        if read_range and size > min(2 * piece, RANGE) and not compression_of(path):
            n = -(-size // piece)
            cuts = [size * i // n for i in range(n + 1)]
            parts += [LineRange(read_range, path, *cut) for cut in pairwise(cuts)]
        else:
            parts.append(FilePart(source, path, size))
    return parts
