"""Denoising: write a text whose sentences were shuffled and of which spans were masked.

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

_ENDS = (".", "!", "?", "。", "！", "？")  # of sentences


def span_lengths(n_masked: int, mean_span: float, rng: np.random.Generator) -> np.ndarray:
    """Draw lengths of spans from a Poisson distribution until they are `n_masked` tokens together.

    The last one is cut to that sum. Spans of length 0 are among them.

    Args:
        n_masked: tokens of all spans, at least 1.
        mean_span: mean of the distribution.
        rng: source of randomness.
    """
    found = np.zeros(0, int)
    while found.sum() < n_masked:
        found = np.append(found, rng.poisson(mean_span, 1 + int(n_masked / mean_span)))
    ends = np.minimum(found.cumsum(), n_masked)
    n_spans = int(np.searchsorted(ends, n_masked)) + 1
    return np.diff(ends[:n_spans], prepend=0)


def fill_spans(tokens: np.ndarray, lengths: np.ndarray, gaps: np.ndarray, mask: int) -> np.ndarray:
    """Replace spans of tokens by one mask each; a span of length 0 is a mask that is put in.

    Args:
        tokens: the text.
        lengths: lengths of the spans, in order.
        gaps: for each span, ascending, how many of the kept tokens are before it.
        mask: id of the mask.

    Returns:
        The kept tokens with the masks between them.
    """
    starts = gaps + lengths.cumsum() - lengths
    removed = np.zeros(len(tokens), bool)
    for start, length in zip(starts, lengths, strict=True):
        removed[start : start + length] = True
    return np.insert(tokens[~removed], gaps, mask)


@dataclass(frozen=True, eq=False)
class Denoising(Corruption):
    """Prediction of a whole text from one with shuffled sentences and masked spans.

    Sentences, which end with eos or with a token that ends in a full stop, a question or an
    exclamation mark, are put in random order. Then spans, of round(infill_rate n) of n tokens
    together, are replaced by one mask each; their lengths are drawn from a Poisson distribution. No
    two masks adjoin; all such places are equally likely. Source and targets stand between the
    tokens that the tokenizer puts around a source (BART: <s> and </s>), else eos ends them.

    Attributes:
        infill_rate: share of the tokens that are masked.
        infill_span: mean tokens of a masked span.
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
        # The longest, as many as there are gaps; no more, too, than leave the source its length.
        lengths = np.sort(lengths)[::-1][: min(n_masked, len(tokens) - n_masked + 1)]
        gaps = rng.choice(len(tokens) - lengths.sum() + 1, len(lengths), replace=False)
        source = fill_spans(source, rng.permutation(lengths), np.sort(gaps), self.special.mask)
        return self._framed(source), self._framed(tokens)

    def _permuted(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the tokens with their sentences in random order."""
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
