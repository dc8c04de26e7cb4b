"""Documents in pieces, so that a single huge file streams with bounded memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

CHUNK = 2**20
LONGEST_CHUNK = 4 * CHUNK

# Tokenizers never merge across one newline between two words, so cutting there leaves the tokens
# as they are. A document without such a place within LONGEST_CHUNK is cut at any newline.
_BEST_CUT = re.compile(r"(?<=\S)\n(?=\S)")


class Chunk(NamedTuple):
    """A stretch of a document; `first` and `last` mark the document's borders."""

    text: str
    first: bool
    last: bool


class Corpus(Protocol):
    """Documents in a fixed order, with a digest of all that determines them."""

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str:
        """sha256 of names and contents."""

    @property
    def size(self) -> int | None:
        """Bytes of text for a progress bar, or None where that is not known in advance."""

    def chunks(self) -> Iterator[Chunk]:
        """Yields the documents in order; none is empty."""


def cut_document(chunks: Iterable[str]) -> Iterator[Chunk]:
    """Cuts one document into pieces of about 2**20 characters.

    The cuts depend on the text alone, not on how it is divided into `chunks`. An empty document
    yields nothing.
    """
    rest, first = "", True
    for chunk in chunks:
        rest += chunk
        while cut := _next_cut(rest):
            yield Chunk(rest[:cut], first, last=False)
            rest, first = rest[cut:], False
    if rest:
        yield Chunk(rest, first, last=True)


def _next_cut(text: str) -> int:
    """Where to cut `text`, or 0 if more of it is needed; text always remains after the cut."""
    best = _BEST_CUT.search(text, CHUNK, LONGEST_CHUNK)
    if best:
        return best.end()
    if len(text) <= LONGEST_CHUNK:
        return 0
    newline = text.rfind("\n", CHUNK, LONGEST_CHUNK)
    return newline + 1 if newline >= 0 else LONGEST_CHUNK
