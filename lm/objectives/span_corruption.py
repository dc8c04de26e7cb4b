"""Span corruption: an encoder reads a text with holes, a decoder writes what was in them.

T5 (Raffel 2020, section 3.1.4 and figure 2), with the lengths of its code (`random_spans_helper`,
`random_spans_noise_mask` of t5/data/preprocessors.py).

Shape letters: B batch, S source length, T target length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lm.data.store import TokenStore
from lm.data.tokenizers.tokenizer import Tokenizer
from lm.data.windows import TokenWindows, token_windows
from lm.errors import UserError
from lm.objectives.objective import Batch, Example, LossSums
from lm.objectives.special_tokens import SpecialTokens, special_tokens
from lm.objectives.token_loss import token_loss

_T5_SENTINELS = 100


def noise_counts(length: int, density: float, mean_span: float) -> tuple[int, int]:
    """(tokens, spans) that are removed from `length` tokens, at least 2; at least one of each."""
    n_noise = min(max(round(length * density), 1), length - 1)
    n_spans = max(round(n_noise / mean_span), 1)
    return n_noise, min(n_spans, length - n_noise)


def raw_length(source_length: int, density: float, mean_span: float) -> tuple[int, int]:
    """(tokens of text, tokens of targets) for sources of at most `source_length`, eos included.

    The most text that fits: 568 and 114 for a source of 512, density 0.15 and mean span 3.
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
    """Which tokens are noise, bool [length]: text and noise take turns, text first, noise last.

    All such masks of `noise_counts` are equally likely.
    """
    whole = max(length, 2)
    n_noise, n_spans = noise_counts(whole, density, mean_span)
    text, noise = (_ends(n, n_spans, rng) for n in (whole - n_noise, n_noise))
    turns = np.zeros(whole, bool)
    turns[text + np.append(0, noise[:-1])] = True
    turns[(text + noise)[:-1]] = True
    return np.logical_xor.accumulate(turns)[:length]


def _ends(total: int, n_parts: int, rng: np.random.Generator) -> np.ndarray:
    """Where the parts of a random partition of `total` things into non-empty parts end."""
    cuts = rng.choice(total - 1, n_parts - 1, replace=False, shuffle=False) + 1
    return np.sort(np.append(cuts, total))


def replace_spans(tokens: np.ndarray, is_hidden: np.ndarray, sentinels: np.ndarray) -> np.ndarray:
    """The tokens with one sentinel, the next of `sentinels`, for each run of hidden ones."""
    goes_on = np.zeros_like(is_hidden)
    goes_on[1:] = is_hidden[1:] & is_hidden[:-1]
    starts = is_hidden & ~goes_on
    return np.where(starts, sentinels[starts.cumsum() - 1], tokens)[~goes_on]


@dataclass(frozen=True, eq=False)
class SpanCorruption:
    """Sources of up to `length` tokens: the text with a sentinel for every span of noise.

    Targets are the spans, each after its sentinel. Both end with eos. As in T5, a window is one
    text whatever documents it holds, and the decoder starts with pad where there is no bos.
    """

    tokenizer: Tokenizer | None
    length: int
    stride: int = 0  # 0: windows adjoin
    noise_density: float = 0.15
    mean_span: float = 3.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    @cached_property
    def _lengths(self) -> tuple[int, int]:
        return raw_length(self.length, self.noise_density, self.mean_span)

    @property
    def n_extra_ids(self) -> int:
        """Ids that the model needs beyond the tokenizer's."""
        special = self._special
        return special.n_extra_ids(special.bos, special.eos, *self._sentinels.tolist())

    @property
    def shapes(self) -> Mapping[str, tuple[tuple[int, ...], str]]:
        source, target = (self.length,), (self._lengths[1],)
        return {
            **dict.fromkeys(("source", "source_segments"), (source, "int32")),
            **dict.fromkeys(("inputs", "targets", "target_segments"), (target, "int32")),
            "weights": (target, "float32"),
        }

    def examples(self, store: TokenStore, training: bool) -> TokenWindows:
        """Windows that fill the sources."""
        n = self._lengths[0]
        stride = self.stride if training and self.stride else n
        return token_windows(store, n - 1, stride, False, training)

    def features(self, example: Example, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Source and its segment [S]; inputs, targets, their segment and weights [T]."""
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
        """The ids of <extra_id_0>, <extra_id_1>, …, as many as there may be spans.

        Where the vocabulary has none they follow it, T5's hundred or what is needed, the last
        first: so that T5's own ids come out.
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
                "that span corruption needs: use a smaller --config.data.sequence_length or a "
                "larger --config.objective.mean_span"
            )
        return np.asarray(known, np.int32)

    def loss(self, model: Any, batch: Batch) -> LossSums:
        """Nats of every target, eos and sentinels included, and how many were predicted right."""
        x_BTD = model.decoder_hidden(
            batch["source"], batch["inputs"], batch["source_segments"], batch["target_segments"]
        )
        targets, weights = batch["targets"], batch["weights"]
        return token_loss(model, x_BTD, targets, weights, self.label_smoothing, self.z_loss)
