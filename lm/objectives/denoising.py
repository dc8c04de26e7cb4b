"""Denoising: reconstruct a text from shuffled sentences and masked spans.

BART (Lewis et al. 2020, §2.2): text infilling and sentence permutation.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import cached_property

import numpy as np
from ml_collections import ConfigDict

from lm.data.tokenizer import Tokenizer
from lm.errors import UserError
from lm.objectives.corruption import Corruption

_ENDS = (".", "!", "?", "。", "！", "？")  # sentence ends


def span_lengths(n_masked: int, mean_span: float, rng: np.random.Generator) -> np.ndarray:
    """Draw Poisson span lengths until they sum to `n_masked` tokens.

    The last span is cut to reach that sum. Spans may have length 0.

    Args:
        n_masked: total number of masked tokens, at least 1.
        mean_span: mean of the distribution.
        rng: random generator.
    """
    found = np.zeros(0, int)
    while found.sum() < n_masked:
        found = np.append(found, rng.poisson(mean_span, 1 + int(n_masked / mean_span)))
    ends = np.minimum(found.cumsum(), n_masked)
    n_spans = int(np.searchsorted(ends, n_masked)) + 1
    return np.diff(ends[:n_spans], prepend=0)


def fill_spans(tokens: np.ndarray, lengths: np.ndarray, gaps: np.ndarray, mask: int) -> np.ndarray:
    """Replace each span by one mask token; a span of length 0 inserts a mask.

    Args:
        tokens: token ids.
        lengths: span lengths, in order.
        gaps: number of kept tokens before each span, ascending.
        mask: mask token id.

    Returns:
        The kept tokens with masks between them.
    """
    starts = gaps + lengths.cumsum() - lengths
    removed = np.zeros(len(tokens), bool)
    for start, length in zip(starts, lengths, strict=True):
        removed[start : start + length] = True
    return np.insert(tokens[~removed], gaps, mask)


@dataclass(frozen=True, eq=False)
class Denoising(Corruption):
    """Reconstruction of a text from shuffled sentences and masked spans.

    Sentences end with eos, or with a token that ends in a full stop, question mark or exclamation
    mark. They are shuffled; then spans with round(infill_rate n) of the n tokens in total are each
    replaced by one mask. Span lengths are Poisson-distributed; masks are never adjacent, and all
    such placements are equally likely. The tokenizer's source template wraps source and targets
    (BART: <s> and </s>); without one, eos ends them.

    Attributes:
        infill_rate: fraction of tokens that are masked.
        infill_span: mean length of a masked span.
        permute_sentences: shuffle the sentences.
    """

    _: KW_ONLY
    infill_rate: float = 0.3
    infill_span: float = 3.0
    permute_sentences: bool = True

    def __post_init__(self) -> None:
        if self.lengths[0] < 2:
            raise UserError(
                f"--config.data.sequence_length={self.length} leaves no room for text: use at "
                "least 4"
            )

    @classmethod
    def from_config(cls, config: ConfigDict, tokenizer: Tokenizer | None) -> Denoising:
        return cls(
            tokenizer,
            config.data.sequence_length,
            stride=config.data.stride,
            infill_rate=config.objective.infill_rate,
            infill_span=config.objective.infill_span,
            permute_sentences=config.objective.permute_sentences,
            label_smoothing=config.objective.label_smoothing,
            z_loss=config.objective.z_loss,
        )

    @property
    def lengths(self) -> tuple[int, int]:
        return self.length - 2, self.length

    @property
    def n_extra_ids(self) -> int:  # type: ignore[override]
        special = self.special
        return special.n_extra_ids(special.bos, special.eos, special.mask)

    def corrupt(
        self, tokens: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        around = self.special.around_source
        tokens = tokens[: self.length - len(around.before) - len(around.after)]
        source = self._permuted(tokens, rng) if self.permute_sentences else tokens
        n_masked = min(max(round(self.infill_rate * len(tokens)), 1), len(tokens))
        lengths = span_lengths(n_masked, self.infill_span, rng)
        # The longest ones, as many as there are gaps; no more than keep the source at its length.
        lengths = np.sort(lengths)[::-1][: min(n_masked, len(tokens) - n_masked + 1)]
        gaps = rng.choice(len(tokens) - lengths.sum() + 1, len(lengths), replace=False)
        source = fill_spans(source, rng.permutation(lengths), np.sort(gaps), self.special.mask)
        return self._framed(source), self._framed(tokens)

    def _permuted(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Shuffle the sentences."""
        ends = np.flatnonzero(self._ends_sentence[tokens[:-1]]) + 1
        sentences = np.split(tokens, ends)
        return np.concatenate([sentences[i] for i in rng.permutation(len(sentences))])

    def _framed(self, tokens: np.ndarray) -> np.ndarray:
        around = self.special.around_source
        return np.concatenate([around.before, tokens, around.after]).astype(np.int32)

    @cached_property
    def _ends_sentence(self) -> np.ndarray:
        assert self.tokenizer is not None
        pieces = (piece.rstrip() for piece in self.tokenizer.pieces())
        ends = np.array([piece.endswith(_ENDS) for piece in pieces])
        ends = np.pad(ends, (0, self.special.n_extra_ids(*self.special.ids)))
        ends[self.special.eos] = True
        return ends
