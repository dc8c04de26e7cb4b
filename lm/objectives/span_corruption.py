"""Span corruption: predict the spans that were removed from the encoder's text.

T5 (Raffel et al. 2020, section 3.1.4 and figure 2), with the lengths of its code
(`random_spans_helper`, `random_spans_noise_mask` of t5/data/preprocessors.py).

Shape letters: B batch, S source length, T target length, D model.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from ml_collections import ConfigDict

from lm.data.batches import Arrays, Example
from lm.data.special_tokens import SpecialTokens, special_tokens
from lm.data.store import TokenStore, TokenWindows, token_windows
from lm.data.tokenizer import Tokenizer
from lm.errors import UserError
from lm.objectives.losses import token_loss
from lm.objectives.objective import Batch, BoundModel, LossSums, Objective, Shapes

_T5_SENTINELS = 100


def noise_counts(length: int, density: float, mean_span: float) -> tuple[int, int]:
    """Return how many tokens, in how many spans, are removed; at least one of each.

    Args:
        length: tokens of the text, at least 2.
        density: share of the tokens that is removed.
        mean_span: mean tokens of a span.
    """
    n_noise = min(max(round(length * density), 1), length - 1)
    n_spans = max(round(n_noise / mean_span), 1)
    return n_noise, min(n_spans, length - n_noise)


def text_and_target_length(source_length: int, density: float, mean_span: float) -> tuple[int, int]:
    """Return the longest text whose source fits, and the length of its targets, in tokens.

    For a source of 512, density 0.15 and mean span 3: 568 and 114.

    Args:
        source_length: tokens of the source, eos included.
        density: share of the tokens that is removed.
        mean_span: mean tokens of a span.

    Raises:
        UserError: the source is too short for any text.
    """

    def lengths(n_raw: int) -> tuple[int, int]:
        n_noise, n_spans = noise_counts(n_raw, density, mean_span)
        return n_raw - n_noise + n_spans + 1, n_noise + n_spans + 1

    n_raw = max(source_length - 1, 2)
    if lengths(n_raw)[0] > source_length:
        raise UserError(
            f"--config.data.sequence_length={source_length} is too short for span corruption: "
            "use at least 3"
        )
    while lengths(n_raw + 1)[0] <= source_length:
        n_raw += 1
    return n_raw, lengths(n_raw)[1]


def noise_mask(
    length: int, density: float, mean_span: float, rng: np.random.Generator
) -> np.ndarray:
    """Return a random mask [length] of the tokens to remove.

    Spans of text and of noise alternate, text first, noise last. All such masks with the counts of
    `noise_counts` are equally likely.
    """
    whole = max(length, 2)
    n_noise, n_spans = noise_counts(whole, density, mean_span)
    text, noise = (_span_ends(n, n_spans, rng) for n in (whole - n_noise, n_noise))
    changes = np.zeros(whole, bool)
    changes[text + np.append(0, noise[:-1])] = True
    changes[(text + noise)[:-1]] = True
    return np.logical_xor.accumulate(changes)[:length]


def _span_ends(total: int, n_spans: int, rng: np.random.Generator) -> np.ndarray:
    """Return the ends of the spans of a random partition of `total` tokens, none empty."""
    cuts = rng.choice(total - 1, n_spans - 1, replace=False, shuffle=False) + 1
    return np.sort(np.append(cuts, total))


def replace_spans(tokens: np.ndarray, is_hidden: np.ndarray, sentinels: np.ndarray) -> np.ndarray:
    """Return the tokens with the next one of `sentinels` in place of each run of hidden tokens."""
    continues = np.zeros_like(is_hidden)
    continues[1:] = is_hidden[1:] & is_hidden[:-1]
    starts = is_hidden & ~continues
    return np.where(starts, sentinels[starts.cumsum() - 1], tokens)[~continues]


@dataclass(frozen=True, eq=False)
class SpanCorruption(Objective[TokenStore, Example]):
    """Prediction of removed spans from the text with a sentinel in place of each.

    Targets are the spans, each after its sentinel. Sources and targets end with eos. As in T5, a
    window is one text whatever documents it holds, and the decoder starts with pad where there is
    no bos.

    Attributes:
        tokenizer: tokenizer of the data, or None.
        length: tokens of a source, S.
        stride: tokens from the start of one training window to the next; 0: the window's length.
        noise_density: share of the tokens that is removed.
        mean_span: mean tokens of a removed span.
        label_smoothing: share of a target's probability spread over the vocabulary.
        z_loss: weight of the squared log-partition function.
    """

    families: ClassVar = ("encoder_decoder",)

    tokenizer: Tokenizer | None
    length: int
    _: KW_ONLY
    stride: int = 0
    noise_density: float = 0.15
    mean_span: float = 3.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    @classmethod
    def from_config(cls, config: ConfigDict, tokenizer: Tokenizer | None) -> SpanCorruption:
        return cls(
            tokenizer,
            config.data.sequence_length,
            stride=config.data.stride,
            noise_density=config.objective.noise_density,
            mean_span=config.objective.mean_span,
            label_smoothing=config.objective.label_smoothing,
            z_loss=config.objective.z_loss,
        )

    @classmethod
    def attention_lengths(cls, config: ConfigDict) -> dict[str, int]:
        (length,), _ = cls.from_config(config, None).shapes["targets"]
        return super().attention_lengths(config) | {"targets of span corruption": length}

    @cached_property
    def _lengths(self) -> tuple[int, int]:
        """Tokens of the text and of the targets, T."""
        return text_and_target_length(self.length, self.noise_density, self.mean_span)

    @property
    def n_extra_ids(self) -> int:  # type: ignore[override]
        special = self._special
        return special.n_extra_ids(special.bos, special.eos, *self._sentinels.tolist())

    @property
    def shapes(self) -> Shapes:
        source, target = (self.length,), (self._lengths[1],)
        return {
            **dict.fromkeys(("source", "source_segments"), (source, "int32")),
            **dict.fromkeys(("inputs", "targets", "target_segments"), (target, "int32")),
            "weights": (target, "float32"),
        }

    def examples(self, store: TokenStore, training: bool) -> TokenWindows:
        """Return windows of as many tokens as fill a source."""
        n = self._lengths[0]
        stride = self.stride if training and self.stride else n
        return token_windows(store, n - 1, stride, False, training)

    def features(self, example: Example, rng: np.random.Generator) -> Arrays:
        """Return source and source_segments [S]; inputs, targets and theirs, weights [T]."""
        tokens = example["tokens"][: np.count_nonzero(example["segment_ids"])]
        is_noise = noise_mask(len(tokens), self.noise_density, self.mean_span, rng)
        eos = self._special.eos
        source = np.append(replace_spans(tokens, is_noise, self._sentinels), eos)
        targets = np.append(replace_spans(tokens, ~is_noise, self._sentinels), eos)
        values = {
            "source": source,
            "source_segments": np.ones(len(source)),
            "inputs": np.append(self._special.bos, targets[:-1]),
            "targets": targets,
            "target_segments": np.ones(len(targets)),
            "weights": np.ones(len(targets)),
        }
        features = {name: np.zeros(*shape) for name, shape in self.shapes.items()}
        for name, value in values.items():
            features[name][: len(value)] = value
        return features

    @cached_property
    def _special(self) -> SpecialTokens:
        return special_tokens(self.tokenizer)

    @cached_property
    def _sentinels(self) -> np.ndarray:
        """Ids of <extra_id_0>, <extra_id_1>, …, as many as there may be spans.

        If the vocabulary has none they are the ids after it, at least T5's hundred, in descending
        order: the ids that T5 itself uses.
        """
        n_spans = noise_counts(self._lengths[0], self.noise_density, self.mean_span)[1]
        tokenizer, special = self.tokenizer, self._special
        if tokenizer is None:
            return np.zeros(n_spans, np.int32)
        if tokenizer.token_id("<extra_id_0>") is None:
            free = special.vocab_size + special.n_extra_ids(special.bos, special.eos)
            return np.arange(free, free + max(n_spans, _T5_SENTINELS), dtype=np.int32)[::-1]
        found = [tokenizer.token_id(f"<extra_id_{i}>") for i in range(n_spans)]
        known = [i for i in found if i is not None]
        if len(known) < n_spans:
            raise UserError(
                f"the {tokenizer.kind} vocabulary has <extra_id_0> but not all of the {n_spans} "
                "that span corruption needs: use a smaller --config.data.sequence_length "
                "or a larger --config.objective.mean_span"
            )
        return np.asarray(known, np.int32)

    def loss(self, model: BoundModel, batch: Batch) -> LossSums:
        """Return the cross-entropy of every target token, eos and sentinels included."""
        x_BTD = model.decoder_hidden(
            batch["source"], batch["inputs"], batch["source_segments"], batch["target_segments"]
        )
        targets, weights = batch["targets"], batch["weights"]
        return token_loss(model, x_BTD, targets, weights, self.label_smoothing, self.z_loss)
