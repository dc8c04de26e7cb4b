"""Skip-gram with negative sampling: a word tells those around it from noise (Mikolov 2013b).

Shape letters: B batch, L words of an example, S words around them and noise, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.data.store import TokenStore
from lm.data.tokenizers.tokenizer import Tokenizer
from lm.data.tokenizers.words import WordTokenizer
from lm.data.windows import TokenWindows, token_windows
from lm.errors import UserError
from lm.objectives.objective import Batch, Example, LossSums


@dataclass(frozen=True, eq=False)
class SkipGram:
    """Every word of `length` tokens with those at most 1 … `window` words away.

    As in the paper, a word that makes up f of the text is kept with probability √(subsample / f)
    (word2vec's code keeps √(subsample / f) + subsample / f), and noise is drawn in proportion to
    count^¾. As in the code, rare words and dropped ones leave no gap, a line ends a context, and
    each centre draws how far its window reaches.

    All pairs of an example share `length` words of noise, each with `negatives` / `length` of the
    weight that a pair's own noise would have: the same expectation, from whole products of
    matrices. Noise that happens to be a pair's context counts, as in the paper's equation 4.
    """

    tokenizer: Tokenizer | None
    length: int
    stride: int = 0  # 0: windows adjoin
    window: int = 5
    negatives: int = 5
    subsample: float = 1e-4

    def __post_init__(self) -> None:
        if self.tokenizer is not None and not self._counts.any():
            raise UserError(
                "--config.objective.name=skip_gram needs to know how frequent words are: use "
                "--config.data.tokenizer=words, or a list of words with their counts"
            )

    @property
    def shapes(self) -> Mapping[str, tuple[tuple[int, ...], str]]:
        return dict.fromkeys(("words", "lines", "reach", "noise"), ((self.length,), "int32"))

    @property
    def n_extra_ids(self) -> int:
        return 0

    # --- features

    def examples(self, store: TokenStore, training: bool) -> TokenWindows:
        """Windows of `length` tokens."""
        stride = self.stride if training and self.stride else self.length
        return token_windows(store, self.length - 1, stride, False, training)

    def features(self, example: Example, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Four arrays [L]: the `words` that are kept; the `lines` that they are in, 0 for padding;
        how far the window of each reaches; and the noise."""
        assert self.tokenizer is not None
        tokens = example["tokens"]
        lines = 1 + np.cumsum(tokens == self.tokenizer.eos_id)
        kept = rng.random(self.length) < self._keep_V[tokens]
        kept &= example["segment_ids"] > 0
        n = np.count_nonzero(kept)
        found = np.zeros((3, self.length), np.int32)
        found[:, :n] = tokens[kept], lines[kept], rng.integers(1, self.window, n, endpoint=True)
        noise = np.searchsorted(self._noise_V, rng.random(self.length), side="right")
        words, lines, reach = found
        return {"words": words, "lines": lines, "reach": reach, "noise": noise.astype(np.int32)}

    @cached_property
    def _counts(self) -> np.ndarray:
        """Of every id, float64 [V]; 0 for what is no word: the end of a line, and unknown ones."""
        if not isinstance(self.tokenizer, WordTokenizer):
            return np.zeros(1)
        counts_V = np.array(self.tokenizer.counts, float)
        counts_V[[self.tokenizer.eos_id, self.tokenizer.unknown_id]] = 0
        return counts_V

    @cached_property
    def _keep_V(self) -> np.ndarray:
        """The probability that a word stays in the text."""
        counts_V = self._counts
        if not self.subsample:
            return (counts_V > 0).astype(float)
        allowed = self.subsample * counts_V.sum()
        return np.sqrt(allowed / np.maximum(counts_V, allowed)) * (counts_V > 0)

    @cached_property
    def _noise_V(self) -> np.ndarray:
        """Cumulative probability of noise."""
        total_V = np.cumsum(self._counts**0.75)
        return total_V / total_V[-1]

    # --- loss

    def loss(self, model: Any, batch: Batch) -> LossSums:
        """Nats of a pair and of its noise to be told apart, and the number of pairs."""
        words_BL, lines_BL, reach_BL = batch["words"], batch["lines"], batch["reach"]
        scores_BLS = model(words_BL, jnp.concatenate([words_BL, batch["noise"]], axis=1))
        paired_BLL, noise_BLL = jnp.split(scores_BLS, 2, axis=-1)
        at_L = jnp.arange(self.length)
        distance_LL = abs(at_L[:, None] - at_L)
        pairs_BLL = (
            (distance_LL > 0)
            & (distance_LL <= reach_BL[:, :, None])
            & (lines_BL[:, :, None] == lines_BL[:, None, :])
        )
        n_pairs_BL = pairs_BLL.sum(-1)
        of_pairs = jnp.where(pairs_BLL, jax.nn.softplus(-paired_BLL), 0).sum()
        of_noise = (jax.nn.softplus(noise_BLL).mean(-1) * n_pairs_BL).sum() * self.negatives
        return LossSums(of_pairs + of_noise, n_pairs_BL.sum().astype(jnp.float32), {})
