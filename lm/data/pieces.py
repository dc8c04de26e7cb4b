"""Documents in pieces, so that a single huge file streams with bounded memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

PIECE = 2**20
LONGEST_PIECE = 4 * PIECE

# Tokenizers never merge across one newline between two words, so cutting there leaves the tokens
# as they are. A document without such a place within LONGEST_PIECE is cut at any newline.
_BEST_CUT = re.compile(r"(?<=\S)\n(?=\S)")


class Piece(NamedTuple):
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

    def pieces(self) -> Iterator[Piece]:
        """Yields the documents in order; none is empty."""


def cut_document(chunks: Iterable[str]) -> Iterator[Piece]:
    """Cuts one document into pieces of about 2**20 characters.

    The cuts depend on the text alone, not on how it is divided into `chunks`. An empty document
    yields nothing.
    """
    rest, first = "", True
    for chunk in chunks:
        rest += chunk
        while cut := _next_cut(rest):
            yield Piece(rest[:cut], first, last=False)
            rest, first = rest[cut:], False
    if rest:
        yield Piece(rest, first, last=True)


def _next_cut(text: str) -> int:
    """Where to cut `text`, or 0 if more of it is needed; text always remains after the cut."""
    best = _BEST_CUT.search(text, PIECE, LONGEST_PIECE)
    if best:
        return best.end()
    if len(text) <= LONGEST_PIECE:
        return 0
    newline = text.rfind("\n", PIECE, LONGEST_PIECE)
    return newline + 1 if newline >= 0 else LONGEST_PIECE
