"""Pages of the key/value cache: allocation to rows, and reuse for prompts with a common prefix.

A page that no row holds keeps its content until it is needed; the least recently used goes first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

_Content = tuple[bytes, bool]  # digest of the tokens to its end; whether it is exact


@dataclass
class PagePool:
    """Pages by index, with reference counts and an index of their content.

    A page's content is its tokens and all tokens before them. A page is "exact" if the program that
    computed it is the one used for any row with these tokens; a request with a seed only uses exact
    pages.

    Attributes:
        n_pages: number of pages.
        page_size: tokens per page.
    """

    n_pages: int
    page_size: int
    _free: list[int] = field(default_factory=list)
    _unused: OrderedDict[int, None] = field(default_factory=OrderedDict)  # kept for reuse
    _holders: dict[int, int] = field(default_factory=dict)
    _page_of: dict[_Content, int] = field(default_factory=dict)
    _content: dict[int, _Content] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._free.extend(reversed(range(self.n_pages)))

    @property
    def n_held(self) -> int:
        """Number of pages held by rows."""
        return len(self._holders)

    @property
    def n_available(self) -> int:
        """Number of pages not held by any row."""
        return self.n_pages - len(self._holders)

    def find(self, tokens: Sequence[int], root: str, exact: bool, multiple: int = 1) -> list[int]:
        """Return the pages that contain the start of a prompt, without holding them.

        Args:
            tokens: the prompt; at least one token is not covered.
            root: identifies what keys and values depend on besides the tokens (an adapter).
            exact: return exact pages only.
            multiple: round their number down to a multiple of this.
        """
        found: list[int] = []
        for block in self._chain(tokens[: len(tokens) - 1], root):
            page = self._page_of.get((block, True))
            if page is None and not exact:
                page = self._page_of.get((block, False))
            if page is None:
                break
            found.append(page)
        return found[: len(found) // multiple * multiple]

    def hold(self, pages: Sequence[int]) -> None:
        """Increment the reference counts of pages returned by `find`."""
        for page in pages:
            self._unused.pop(page, None)
            self._holders[page] = self._holders.get(page, 0) + 1

    def take(self, n: int) -> list[int]:
        """Allocate pages for a row and drop their content; there must be `n` available ones."""
        taken = []
        for _ in range(n):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._unused.popitem(last=False)
                self._forget(page)
            self._holders[page] = 1
            taken.append(page)
        return taken

    def release(self, pages: Sequence[int]) -> None:
        """Decrement reference counts; a text's first pages are evicted last."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if not self._holders[page]:
                del self._holders[page]
                if page in self._content:
                    self._unused[page] = None
                else:
                    self._free.append(page)

    def store(
        self, tokens: Sequence[int], root: str, pages: Sequence[int], n_exact: int, first: int = 0
    ) -> None:
        """Register the content of a row's full pages, so that others find them.

        Args:
            tokens: tokens of the row whose keys and values are written.
            root: see `find`.
            pages: pages of the row.
            n_exact: number of exact pages at the start.
            first: number of pages at the start that were already registered.
        """
        for i, block in enumerate(self._chain(tokens, root)):
            key = block, i < n_exact
            if i >= first and key not in self._page_of and pages[i] not in self._content:
                self._page_of[key] = pages[i]
                self._content[pages[i]] = key

    def clear(self) -> None:
        """Forget the content of all pages, after parameters have changed."""
        for page in list(self._unused):
            self._free.append(page)
        self._unused.clear()
        self._page_of.clear()
        self._content.clear()

    def _forget(self, page: int) -> None:
        del self._page_of[self._content.pop(page)]

    def _chain(self, tokens: Sequence[int], root: str) -> Iterator[bytes]:
        """Yield a digest for each full page of a text: of its tokens and all before them."""
        before = hashlib.blake2b(root.encode(), digest_size=16).digest()
        for start in range(0, len(tokens) - self.page_size + 1, self.page_size):
            block = np.asarray(tokens[start : start + self.page_size], np.int32)
            before = hashlib.blake2b(before + block.tobytes(), digest_size=16).digest()
            yield before
