"""Masked language modeling: predict masked tokens from both sides.

BERT (Devlin et al. 2018, section 3.1) with dynamic masking (RoBERTa, Liu et al. 2019, section 4.1),
and optionally BERT's next-sentence prediction.

Shape letters: B batch, L length, P predictions, D model, V vocabulary.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from numpy.typing import DTypeLike

from lm.data.batches import Arrays, Example, Examples
from lm.data.special_tokens import SpecialTokens, special_tokens
from lm.data.store import TokenStore, TokenWindows, token_windows
from lm.data.tokenizer import Tokenizer
from lm.data.tokenizers.basic import word_starts
from lm.errors import UserError
from lm.objectives.losses import cross_entropy, token_loss
from lm.objectives.objective import Batch, BoundModel, LossSums, Objective, Shapes


@dataclass(frozen=True, eq=False)
class Masked(Objective[TokenStore, Example]):
    """Masked-token prediction in rows "[CLS] window [SEP]".

    Of n ordinary tokens, exactly round(mask_rate n) and at least one are predicted (BERT's rule):
    80 % become [MASK], 10 % a random token, 10 % stay. With `whole_word` they are all tokens of
    randomly chosen words; a word that would exceed the number is skipped.

    With `next_sentence`, rows are "[CLS] A [SEP] B [SEP]". The longest segment of the window (its
    longest document, if isolated) is split at a random position; for half of the rows, B is
    replaced by as many tokens from a random window of the store. BERT splits between sentences,
    whose boundaries a token store does not know.

    Attributes:
        tokenizer: tokenizer of the data, or None.
        length: row length L in tokens.
        stride: tokens between the starts of consecutive training windows; 0: the window length.
        isolate_documents: attention and positions stay within a document.
        mask_rate: fraction of tokens that are predicted.
        whole_word: mask all tokens of a word together.
        next_sentence: also predict whether B follows A.
        label_smoothing: probability mass spread over the vocabulary.
        z_loss: weight of the squared log-partition function.
        n_rows: rows of the token table, which limit random tokens; 0: no limit.
    """

    families: ClassVar = ("encoder",)
    shares: ClassVar = (0.8, 0.9)  # cumulative fractions of [MASK] and of random tokens

    tokenizer: Tokenizer | None
    length: int
    _: KW_ONLY
    stride: int = 0
    isolate_documents: bool = True
    mask_rate: float = 0.15
    whole_word: bool = False
    next_sentence: bool = False
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    n_rows: int = 0

    def __post_init__(self) -> None:
        if self.window_length < 2:
            raise UserError(
                f"--config.data.sequence_length={self.length} leaves no room for text between "
                "[CLS] and [SEP]: use at least 5"
            )

    @classmethod
    def from_config(cls, config: ConfigDict, tokenizer: Tokenizer | None) -> Masked:
        return cls(
            tokenizer,
            config.data.sequence_length,
            stride=config.data.stride,
            isolate_documents=config.data.isolate_documents,
            mask_rate=config.objective.mask_rate,
            whole_word=config.objective.whole_word,
            next_sentence=config.objective.next_sentence,
            label_smoothing=config.objective.label_smoothing,
            z_loss=config.objective.z_loss,
            n_rows=config.model.vocab_size,
        )

    @property
    def window_length(self) -> int:
        """Tokens per window: a row without special tokens."""
        return self.length - (3 if self.next_sentence else 2)

    @property
    def n_extra_ids(self) -> int:  # type: ignore[override]
        return self._special.n_extra_ids(self._special.cls, self._special.sep, self._special.mask)

    @property
    def shapes(self) -> Shapes:
        """Feature shapes; P, the number of predictions in a full row, is static."""
        row, masked = (self.length,), (self._n_masked(self.window_length),)
        shapes = {
            **dict.fromkeys(("inputs", "segment_ids", "positions"), (row, "int32")),
            **dict.fromkeys(("masked_positions", "targets"), (masked, "int32")),
            "weights": (masked, "float32"),
        }
        pair_shapes = {"token_types": (row, "int32"), "is_next": ((), "int32")}
        return shapes | pair_shapes if self.next_sentence else shapes

    # --- features

    def examples(self, store: TokenStore, training: bool) -> Examples[Example]:
        """Return windows of `window_length` tokens, with all "others" for next_sentence."""
        n = self.window_length
        stride = self.stride if training and self.stride else n
        found = token_windows(store, n - 1, stride, self.isolate_documents, training)
        return _WithOthers(found) if self.next_sentence else found

    def features(self, example: Example, rng: np.random.Generator) -> Arrays:
        """Return inputs, segment_ids, positions [L] and masked_positions, targets, weights [P].

        With next_sentence, also token_types [L] and is_next [].
        """
        if not self.next_sentence:
            return self._masked(self._single(example), rng)
        first, second, is_next = self._texts(example, rng)
        row = self._masked(self._pair(first, second), rng)
        return row | {"is_next": np.asarray(is_next, np.int32)}

    def _single(self, example: Example) -> Arrays:
        """Build the row of one text: [CLS] joins its first segment, [SEP] its last."""
        n = np.count_nonzero(example["segment_ids"])
        tokens, segments, positions = (
            example[name][:n] for name in ("tokens", "segment_ids", "positions")
        )
        positions = positions + (segments == segments[:1])
        return {
            "inputs": np.concatenate([[self._special.cls], tokens, [self._special.sep]]),
            "segment_ids": np.concatenate([segments[:1], segments, segments[-1:]]),
            "positions": np.concatenate([[0], positions, positions[-1:] + 1]),
        }

    def _texts(
        self, example: Example, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, bool]:
        """Return A, B and whether B follows A."""
        text = self._longest(example)
        cut = rng.integers(1, len(text)) if len(text) > 1 else len(text)
        first, second = text[:cut], text[cut:]
        is_next = rng.random() < 0.5
        if not is_next:
            others = example["others"]
            other = self._longest(others[int(rng.integers(len(others)))])
            size = min(len(second), len(other))
            start = rng.integers(len(other) - size + 1)
            second = other[start : start + size]
        return first, second, is_next

    def _longest(self, example: Example) -> np.ndarray:
        """Return the ordinary (non-special) tokens of a window's longest segment."""
        segments = example["segment_ids"]
        longest = 1 + np.bincount(segments)[1:].argmax()
        text = example["tokens"][segments == longest]
        return text[self._is_ordinary[text]]

    def _pair(self, first: np.ndarray, second: np.ndarray) -> Arrays:
        """Build the row of two texts, in a single segment."""
        cls, sep = [self._special.cls], [self._special.sep]
        inputs = np.concatenate([cls, first, sep, second, sep])
        n = len(inputs)
        return {
            "inputs": inputs,
            "segment_ids": np.ones(n),
            "positions": np.arange(n),
            "token_types": np.arange(n) >= len(first) + 2,
        }

    def _masked(self, row: Arrays, rng: np.random.Generator) -> Arrays:
        """Return the padded row with masks, and the target tokens."""
        features = {name: _padded(values, self.length, np.int32) for name, values in row.items()}
        inputs = features["inputs"]
        at = self._masked_positions(inputs, features["segment_ids"], rng)
        targets = inputs[at]
        draw = rng.random(len(at))
        random_tokens = rng.choice(self._ordinary_ids, len(at))
        masks, changed = self.shares
        inputs[at] = np.where(
            draw < masks, self._special.mask, np.where(draw < changed, random_tokens, targets)
        )
        n = self._n_masked(self.window_length)
        return features | {
            "masked_positions": _padded(at, n, np.int32),
            "targets": _padded(targets, n, np.int32),
            "weights": _padded(np.ones(len(at)), n, np.float32),
        }

    def _masked_positions(
        self, inputs: np.ndarray, segment_ids: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """Return the positions of the tokens to predict, in order."""
        ordinary = self._is_ordinary[inputs] & (segment_ids > 0)
        at = np.flatnonzero(ordinary)
        if not len(at):
            return at
        room = self._n_masked(len(at))
        if not self.whole_word:
            return np.sort(rng.choice(at, room, replace=False, shuffle=False))
        begins = self._word_starts[inputs]
        begins[1:] |= ~ordinary[:-1] | (segment_ids[1:] != segment_ids[:-1])
        starts = np.flatnonzero(begins[at])
        sizes = np.diff(starts, append=len(at)).tolist()
        chosen = np.zeros(len(starts), bool)
        for word in rng.permutation(len(starts)).tolist():
            if sizes[word] <= room:
                chosen[word] = True
                room -= sizes[word]
                if not room:
                    break
        return at[np.repeat(chosen, sizes)]

    def _n_masked(self, n_tokens: int) -> int:
        return max(1, round(self.mask_rate * n_tokens))

    @cached_property
    def _special(self) -> SpecialTokens:
        return special_tokens(self.tokenizer)

    @cached_property
    def _is_ordinary(self) -> np.ndarray:
        special = self._special
        ordinary = np.ones(special.vocab_size + special.n_extra_ids(*special.ids), bool)
        ordinary[list(special.ids)] = False
        return ordinary

    @cached_property
    def _ordinary_ids(self) -> np.ndarray:
        return np.flatnonzero(self._is_ordinary[: self.n_rows or None])

    @cached_property
    def _word_starts(self) -> np.ndarray:
        assert self.tokenizer is not None
        return _padded(word_starts(self.tokenizer), len(self._is_ordinary), np.bool_)

    # --- loss

    def loss(self, model: BoundModel, batch: Batch) -> LossSums:
        """Return the cross-entropy of masked tokens plus, with next_sentence, of `is_next`.

        The paper adds the two means. Here a row's `is_next` has the weight of its masked tokens:
        equivalent for equally full rows, and additive over parts of a batch.
        """
        segment_ids_BL = batch["segment_ids"]
        x_BLD = model.hidden(
            batch["inputs"], batch["positions"], segment_ids_BL, batch.get("token_types")
        )
        x_BPD = jnp.take_along_axis(x_BLD, batch["masked_positions"][..., None], axis=1)
        targets_BP, weights_BP = batch["targets"], batch["weights"]
        sums = token_loss(model, x_BPD, targets_BP, weights_BP, self.label_smoothing, self.z_loss)
        if not self.next_sentence:
            return sums
        scores_B2 = model.next_sentence(model.pooled(x_BLD, segment_ids_BL))
        classes_B = 1 - batch["is_next"]  # class order of BERT's published weights
        weights_B = weights_BP.sum(-1)
        loss_B, _, correct_B = cross_entropy(scores_B2, classes_B)
        nats, accuracy = (loss_B * weights_B).sum(), (correct_B * weights_B).sum()
        pair_metrics = {"next_sentence_nll": nats, "next_sentence_accuracy": accuracy}
        return LossSums(sums.loss + nats, sums.weight, sums.metrics | pair_metrics)


@dataclass(frozen=True, eq=False)
class _WithOthers:
    """Windows, each with a reference to all windows."""

    windows: TokenWindows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Example:
        return {**self.windows[index], "others": self.windows}


def _padded(values: np.ndarray, length: int, dtype: DTypeLike) -> np.ndarray:
    """Pad values with zeros to [length]."""
    padded = np.zeros(length, dtype)
    padded[: len(values)] = values
    return padded
