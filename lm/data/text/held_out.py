"""Holding out a part of a corpus for validation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lm.data.text.corpus import Chunk, Corpus, cut_document
from lm.errors import UserError


@dataclass(frozen=True)
class HeldOut:
    """All but a `fraction` of a corpus ("train"), or that rest ("validation").

    A corpus of one document is divided at a character, int(n_characters * (1 - fraction)) as
    nanoGPT does. Of several documents as many are in "train", and the others are a fixed random
    choice: corpora are often sorted, by source or by date.
    """

    corpus: Corpus
    fraction: float
    split: str

    size = None

    @property
    def name(self) -> str:
        return f"{self.corpus.name} ({self.split})"

    @cached_property
    def digest(self) -> str:
        parts = (self.corpus.digest, "held out at random", self.fraction, self.split)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def chunks(self) -> Iterator[Chunk]:
        n_documents, n_characters = self._counts
        total = n_characters if n_documents == 1 else n_documents
        border = int(total * (1 - self.fraction))
        if not 0 < border < total:
            unit = "characters" if n_documents == 1 else "documents"
            raise UserError(
                f"--config.data.validation_fraction={self.fraction} of {self.corpus.name} leaves "
                f"a split empty: it has {total} {unit}"
            )
        if n_documents == 1:
            yield from cut_document(self._characters(border))
        else:
            chosen = np.random.default_rng(0).choice(total, total - border, replace=False)
            yield from self._documents(frozenset(chosen.tolist()))

    @cached_property
    def _counts(self) -> tuple[int, int]:
        n_documents = n_characters = 0
        for piece in self.corpus.chunks():
            n_documents += piece.first
            n_characters += len(piece.text)
        return n_documents, n_characters

    def _characters(self, border: int) -> Iterator[str]:
        """The text of the only document on this split's side of the border."""
        start = 0
        for piece in self.corpus.chunks():
            cut = max(border - start, 0)
            yield piece.text[:cut] if self.split == "train" else piece.text[cut:]
            start += len(piece.text)

    def _documents(self, held_out: frozenset[int]) -> Iterator[Chunk]:
        index = -1
        for piece in self.corpus.chunks():
            index += piece.first
            if (index in held_out) == (self.split == "validation"):
                yield piece
