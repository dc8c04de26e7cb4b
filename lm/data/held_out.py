"""Validation data held out from the training data (`data.validation_fraction`)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from lm.data.sources import Chunk, Corpus, Part, cut_document
from lm.errors import UserError

if TYPE_CHECKING:
    from lm.data.record_store import RecordStore


@dataclass(frozen=True)
class HeldOut:
    """One side of a corpus that is split into "train" and "validation".

    A corpus with a single document is split at character int(n_characters * (1 - fraction)), as in
    nanoGPT. Several documents are split at random by `seed`, because corpora are often
    sorted by source or date.
    """

    corpus: Corpus
    fraction: float
    split: str
    seed: int = 0

    @property
    def size(self) -> int | None:
        """Approximate bytes of text, since documents differ in length."""
        share = self.fraction if self.split == "validation" else 1 - self.fraction
        return None if self.corpus.size is None else round(share * self.corpus.size)

    @property
    def name(self) -> str:
        return f"{self.corpus.name} ({self.split})"

    @property
    def card(self) -> str:
        """Digest of the data card of the corpus; "" without one."""
        return getattr(self.corpus, "card", "")

    @cached_property
    def digest(self) -> str:
        by_seed = (self.seed,) if self.seed else ()  # keep the digests of earlier versions
        parts = (self.corpus.digest, "held out at random", self.fraction, self.split, *by_seed)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def chunks(self) -> Iterator[Chunk]:
        n_documents, n_characters = self._counts
        if n_documents == 1:
            yield from cut_document(self._characters(self.border(n_characters, "characters")))
        else:
            chosen = frozenset(self.chosen(n_documents).tolist())
            yield from _documents(self.corpus.chunks(), chosen, self.split == "validation")

    def sides_of(self, parts: Sequence[Part], n_documents: Sequence[int]) -> list[PartSide]:
        """Return this side of each part of a corpus with several documents.

        Args:
            parts: the parts.
            n_documents: number of documents of each part.
        """
        chosen = np.sort(self.chosen(sum(n_documents)))
        starts = np.concatenate([[0], np.cumsum(n_documents)])
        borders = chosen.searchsorted(starts)
        return [
            PartSide(part, chosen[low:high] - start, self.split == "validation")
            for part, start, low, high in zip(parts, starts, borders, borders[1:], strict=False)
        ]

    def border(self, total: int, unit: str) -> int:
        border = int(total * (1 - self.fraction))
        if not 0 < border < total:
            raise UserError(
                f"--config.data.validation_fraction={self.fraction} of {self.corpus.name} leaves "
                f"a split empty: it has {total} {unit}"
            )
        return border

    def chosen(self, n_documents: int) -> np.ndarray:
        """Return the indices of the held-out documents."""
        n = n_documents - self.border(n_documents, "documents")
        return np.random.default_rng(self.seed).choice(n_documents, n, replace=False)

    @cached_property
    def _counts(self) -> tuple[int, int]:
        n_documents = n_characters = 0
        for chunk in self.corpus.chunks():
            n_documents += chunk.first
            n_characters += len(chunk.text)
        return n_documents, n_characters

    def _characters(self, border: int) -> Iterator[str]:
        """Yield the text of the single document on this side of the border."""
        start = 0
        for chunk in self.corpus.chunks():
            cut = max(border - start, 0)
            yield chunk.text[:cut] if self.split == "train" else chunk.text[cut:]
            start += len(chunk.text)


@dataclass(frozen=True, eq=False)
class PartSide:
    """One side of a part of a corpus: its held-out documents, or the others.

    Attributes:
        part: the part.
        held_out: indices of the part's held-out documents.
        validation: select the held-out documents rather than the others.
    """

    part: Part
    held_out: np.ndarray
    validation: bool

    @property
    def name(self) -> str:
        return self.part.name

    @property
    def size(self) -> int | None:
        return self.part.size

    @property
    def path(self) -> Any:
        """File of the part; None if it has none."""
        return getattr(self.part, "path", None)

    def chunks(self) -> Iterator[Chunk]:
        held_out = frozenset(self.held_out.tolist())
        return _documents(self.part.chunks(), held_out, self.validation)


def _documents(
    chunks: Iterable[Chunk], held_out: frozenset[int], validation: bool
) -> Iterator[Chunk]:
    """Yield the chunks of the held-out documents, or of the others."""
    index = -1
    for chunk in chunks:
        index += chunk.first
        if (index in held_out) == validation:
            yield chunk


def split_records(store: Any, data: Any) -> tuple[RecordStore, RecordStore]:
    """Split a store into training records and a random `data.validation_fraction`.

    The split is random because task files are often sorted, by class or difficulty.
    """
    border = int(len(store) * (1 - data.validation_fraction))
    if not 0 < border < len(store):
        raise UserError(
            f"--config.data.validation_fraction={data.validation_fraction} of "
            f"{store.manifest.source} leaves a split empty: it has {len(store)} records"
        )
    order = np.random.default_rng(data.validation_seed).permutation(len(store))
    return store.select(np.sort(order[:border])), store.select(np.sort(order[border:]))
