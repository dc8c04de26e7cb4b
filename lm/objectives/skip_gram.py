"""Skip-gram with negative sampling: distinguish context words from noise (Mikolov et al. 2013b).

Shape letters: B batch, L words per example, S context and noise words, V vocabulary.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lm.data.batches import Arrays, Example
from lm.data.store import TokenStore, TokenWindows, token_windows
from lm.data.tokenizer import Tokenizer
from lm.data.tokenizers.basic import WordTokenizer
from lm.errors import UserError
from lm.objectives.objective import Batch, BoundModel, LossSums, Objective, Shapes


@dataclass(frozen=True, eq=False)
class NegativeSampling(Objective[TokenStore, Example]):
    """Skip-gram: each word is paired with the words at most 1 … `window` words away.

    As in the paper, a word with relative frequency f is kept with probability √(subsample / f)
    (word2vec's code keeps √(subsample / f) + subsample / f), and noise is drawn in proportion to
    count^¾. As in the code, rare and dropped words leave no gap, context does not cross lines, and
    each center word draws its window size.

    All pairs of an example share `length` noise words, each with `negatives` / `length` of the
    weight of a pair's own noise: the same expectation, computed by dense matrix products. Noise
    that equals a pair's context counts, as in equation 4 of the paper.

    Attributes:
        tokenizer: tokenizer of whole words with counts, or None.
        length: words per example, L.
        stride: words between the starts of consecutive training windows; 0: `length`.
        window: maximum distance of a pair.
        negatives: noise words per pair.
        subsample: relative frequency above which words are randomly dropped; 0: never.
    """

    families: ClassVar = ("skip_gram",)
    has_perplexity: ClassVar = False

    tokenizer: Tokenizer | None
    length: int
    _: KW_ONLY
    stride: int = 0
    window: int = 5
    negatives: int = 5
    subsample: float = 1e-4

    def __post_init__(self) -> None:
        if self.tokenizer is not None and not self._counts.any():
            raise UserError(
                "--config.objective.name=skip_gram needs word counts: use "
                "--config.data.tokenizer=words, or a word list with counts"
            )

    @classmethod
    def from_config(cls, config: ConfigDict, tokenizer: Tokenizer | None) -> NegativeSampling:
        return cls(
            tokenizer,
            config.data.sequence_length,
            stride=config.data.stride,
            window=config.objective.window,
            negatives=config.objective.negatives,
            subsample=config.objective.subsample,
        )

    @property
    def shapes(self) -> Shapes:
        names = ("inputs", "segment_ids", "window_sizes", "noise")
        return dict.fromkeys(names, ((self.length,), "int32"))

    # --- features

    def examples(self, store: TokenStore, training: bool) -> TokenWindows:
        """Return windows of `length` tokens."""
        stride = self.stride if training and self.stride else self.length
        return token_windows(store, self.length - 1, stride, False, training)

    def features(self, example: Example, rng: np.random.Generator) -> Arrays:
        """Return arrays [L]: kept words, their line numbers, window sizes and noise words.

        "segment_ids" are line numbers, counted from 1; 0 is padding.
        """
        assert self.tokenizer is not None
        tokens = example["tokens"]
        lines = 1 + np.cumsum(tokens == self.tokenizer.eos_id)
        kept = rng.random(self.length) < self._keep_V[tokens]
        kept &= example["segment_ids"] > 0
        n = np.count_nonzero(kept)
        found = np.zeros((3, self.length), np.int32)
        found[:, :n] = tokens[kept], lines[kept], rng.integers(1, self.window, n, endpoint=True)
        noise = np.searchsorted(self._noise_V, rng.random(self.length), side="right")
        words, lines, window_sizes = found
        return {
            "inputs": words,
            "segment_ids": lines,
            "window_sizes": window_sizes,
            "noise": noise.astype(np.int32),
        }

    @cached_property
    def _counts(self) -> np.ndarray:
        """Count of every id, float64 [V]; 0 for end of line and unknown words."""
        if not isinstance(self.tokenizer, WordTokenizer):
            return np.zeros(1)
        counts_V = np.array(self.tokenizer.counts, float)
        counts_V[[self.tokenizer.eos_id, self.tokenizer.unknown_id]] = 0
        return counts_V

    @cached_property
    def _keep_V(self) -> np.ndarray:
        """Probability [V] of keeping a word."""
        counts_V = self._counts
        if not self.subsample:
            return (counts_V > 0).astype(float)
        allowed = self.subsample * counts_V.sum()
        return np.sqrt(allowed / np.maximum(counts_V, allowed)) * (counts_V > 0)

    @cached_property
    def _noise_V(self) -> np.ndarray:
        """Cumulative noise distribution [V]."""
        total_V = np.cumsum(self._counts**0.75)
        return total_V / total_V[-1]

    # --- loss

    def loss(self, model: BoundModel, batch: Batch) -> LossSums:
        """Return the logistic loss of pairs and their noise; the weight is the number of pairs."""
        words_BL, lines_BL = batch["inputs"], batch["segment_ids"]
        scores_BLS = model(words_BL, jnp.concatenate([words_BL, batch["noise"]], axis=1))
        paired_BLL, noise_BLL = jnp.split(scores_BLS, 2, axis=-1)
        index_L = jnp.arange(self.length)
        distance_LL = abs(index_L[:, None] - index_L)
        pairs_BLL = (
            (distance_LL > 0)
            & (distance_LL <= batch["window_sizes"][:, :, None])
            & (lines_BL[:, :, None] == lines_BL[:, None, :])
        )
        n_pairs_BL = pairs_BLL.sum(-1)
        pair_loss = jnp.where(pairs_BLL, jax.nn.softplus(-paired_BLL), 0).sum()
        noise_loss = (jax.nn.softplus(noise_BLL).mean(-1) * n_pairs_BL).sum() * self.negatives
        return LossSums(pair_loss + noise_loss, n_pairs_BL.sum().astype(jnp.float32), {})
