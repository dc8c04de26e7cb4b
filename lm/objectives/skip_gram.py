"""Skip-gram with negative sampling: tell the context of a word from noise (Mikolov et al. 2013b).

Shape letters: B batch, L words of an example, S context and noise words, V vocabulary.
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
    """Skip-gram: each word of a text paired with the words at most 1 … `window` words away.

    As in the paper, a word that makes up f of the text is kept with probability √(subsample / f)
    (word2vec's code keeps √(subsample / f) + subsample / f), and noise is drawn in proportion to
    count^¾. As in the code, rare words and dropped ones leave no gap, a line ends a context, and
    each centre draws the size of its window.

    All pairs of an example share `length` noise words, each with `negatives` / `length` of the
    weight that a pair's own noise would have: the same expectation, computed by dense matrix
    products. Noise that happens to be a pair's context counts, as in the paper's equation 4.

    Attributes:
        tokenizer: tokenizer of whole words with their counts, or None.
        length: words of an example, L.
        stride: words from the start of one training window to the next; 0: `length`.
        window: largest distance of a pair.
        negatives: noise words a pair.
        subsample: threshold of the share above which a word is dropped at times; 0: never.
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
                "--config.objective.name=skip_gram needs the counts of words: use "
                "--config.data.tokenizer=words, or a list of words with their counts"
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
        """Return the windows of `length` tokens."""
        stride = self.stride if training and self.stride else self.length
        return token_windows(store, self.length - 1, stride, False, training)

    def features(self, example: Example, rng: np.random.Generator) -> Arrays:
        """Return arrays [L]: the words that are kept, their lines, window sizes, and noise words.

        "segment_ids" are the lines, counted from 1; 0 is padding.
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
        """Count of every id, float64 [V]; 0 for the end of a line and unknown words."""
        if not isinstance(self.tokenizer, WordTokenizer):
            return np.zeros(1)
        counts_V = np.array(self.tokenizer.counts, float)
        counts_V[[self.tokenizer.eos_id, self.tokenizer.unknown_id]] = 0
        return counts_V

    @cached_property
    def _keep_V(self) -> np.ndarray:
        """Probability [V] that a word is kept."""
        counts_V = self._counts
        if not self.subsample:
            return (counts_V > 0).astype(float)
        allowed = self.subsample * counts_V.sum()
        return np.sqrt(allowed / np.maximum(counts_V, allowed)) * (counts_V > 0)

    @cached_property
    def _noise_V(self) -> np.ndarray:
        """Cumulative probability [V] of the noise distribution."""
        total_V = np.cumsum(self._counts**0.75)
        return total_V / total_V[-1]

    # --- loss

    def loss(self, model: BoundModel, batch: Batch) -> LossSums:
        """Return the logistic loss of pairs and of their noise; the weight is their number."""
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
