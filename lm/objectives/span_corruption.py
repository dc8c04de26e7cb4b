"""Span corruption: predict the spans removed from the encoder's input.

T5 (Raffel et al. 2020, section 3.1.4 and figure 2), with the lengths of its code
(`random_spans_helper`, `random_spans_noise_mask` of t5/data/preprocessors.py), and the mixture of
denoisers of UL2 (Tay et al. 2022, section 3.1).

Shape letters: S source length, T target length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property

import numpy as np
from ml_collections import ConfigDict

from lm.config.registry import listed
from lm.data.tokenizer import Tokenizer
from lm.errors import UserError
from lm.objectives.corruption import Corruption

_T5_SENTINELS = 100


def noise_counts(length: int, density: float, mean_span: float) -> tuple[int, int]:
    """Return the numbers of removed tokens and removed spans; at least one of each.

    Args:
        length: number of tokens, at least 2.
        density: fraction of tokens that are removed.
        mean_span: mean span length in tokens.
    """
    n_noise = min(max(round(length * density), 1), length - 1)
    n_spans = max(round(n_noise / mean_span), 1)
    return n_noise, min(n_spans, length - n_noise)


def text_and_target_length(source_length: int, density: float, mean_span: float) -> tuple[int, int]:
    """Return the maximum text length that fits the source, and its target length, in tokens.

    For a source of 512, density 0.15 and mean span 3: 568 and 114.

    Args:
        source_length: source length in tokens, including eos.
        density: fraction of tokens that are removed.
        mean_span: mean span length in tokens.

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

    Text and noise spans alternate, text first, noise last. All such masks with the counts of
    `noise_counts` are equally likely.
    """
    whole = max(length, 2)
    n_noise, n_spans = noise_counts(whole, density, mean_span)
    text, noise = (_span_ends(n, n_spans, rng) for n in (whole - n_noise, n_noise))
    changes = np.zeros(whole, bool)
    changes[text + np.append(0, noise[:-1])] = True
    changes[(text + noise)[:-1]] = True
    return np.logical_xor.accumulate(changes)[:length]


def suffix_mask(length: int, density: float, rng: np.random.Generator) -> np.ndarray:
    """Return a mask [length] of a random number of last tokens, with mean fraction `density`."""
    most = min(max(round(2 * length * density) - 1, 1), length - 1)
    return np.arange(length) >= length - rng.integers(1, most + 1)


def _span_ends(total: int, n_spans: int, rng: np.random.Generator) -> np.ndarray:
    """Return the ends of a random partition of `total` tokens into non-empty spans."""
    cuts = rng.choice(total - 1, n_spans - 1, replace=False, shuffle=False) + 1
    return np.sort(np.append(cuts, total))


def replace_spans(tokens: np.ndarray, is_hidden: np.ndarray, sentinels: np.ndarray) -> np.ndarray:
    """Replace each run of hidden tokens by the next sentinel."""
    continues = np.zeros_like(is_hidden)
    continues[1:] = is_hidden[1:] & is_hidden[:-1]
    starts = is_hidden & ~continues
    return np.where(starts, sentinels[starts.cumsum() - 1], tokens)[~continues]


@dataclass(frozen=True)
class Denoiser:
    """One way to corrupt a text.

    Attributes:
        prefix: mode token or text before the source; "": none.
        density: fraction of tokens that are removed.
        mean_span: mean length of removed spans; 0: remove the end of the text.
    """

    prefix: str
    density: float
    mean_span: float

    def lengths(self, source_length: int) -> tuple[int, int]:
        """Return the maximum text length that fits the source, and its target length, in tokens."""
        if self.mean_span:
            return text_and_target_length(source_length, self.density, self.mean_span)
        n_raw = max(source_length - 1, 2)  # a sentinel replaces at least one token
        return n_raw, self.target_length(n_raw)

    def target_length(self, n_raw: int) -> int:
        """Return the maximum target length for a text of `n_raw` tokens."""
        if self.mean_span:
            return sum(noise_counts(n_raw, self.density, self.mean_span)) + 1
        return min(max(round(2 * n_raw * self.density) - 1, 1), n_raw - 1) + 2

    def mask(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """Return a random mask [length] of the tokens to remove."""
        if self.mean_span:
            return noise_mask(length, self.density, self.mean_span, rng)
        return suffix_mask(max(length, 2), self.density, rng)[:length]


# R, S and X denoisers of Tay et al. 2022, Table 1 and section 3.1.2, as released.
UL2 = "[NLU]:0.15:3,[NLU]:0.15:8,[S2S]:0.25:end,[NLG]:0.5:3,[NLG]:0.5:8,[NLG]:0.15:64,[NLG]:0.5:64"


def read_denoisers(text: str) -> tuple[Denoiser, ...]:
    """Parse a comma-separated list of PREFIX:DENSITY:SPAN, or "ul2".

    Raises:
        UserError: an entry is malformed.
    """
    found = []
    for entry in listed(UL2 if text == "ul2" else text):
        prefix, _, numbers = entry.partition(":")
        density, _, span = numbers.partition(":")
        try:
            denoiser = Denoiser(prefix, float(density), 0.0 if span == "end" else float(span))
        except ValueError:
            denoiser = Denoiser(prefix, 0.0, 0.0)
        if not 0.001 <= denoiser.density <= 0.9 or not (span == "end" or denoiser.mean_span >= 1):
            raise UserError(
                f"--config.objective.denoisers: {entry!r} is not PREFIX:DENSITY:SPAN with a "
                "density from 0.001 to 0.9 and a mean span of 1 or more, or end; or ul2 alone"
            )
        found.append(denoiser)
    return tuple(found)


@dataclass(frozen=True, eq=False)
class SpanCorruption(Corruption):
    """Prediction of removed spans from a text with a sentinel in place of each.

    Targets are the spans, each preceded by its sentinel. Sources and targets end with eos. With
    several denoisers, one is drawn uniformly for each window; the window length fits the source for
    all of them, and the denoiser's prefix is prepended to the source.

    Attributes:
        denoisers: ways to corrupt a text.
    """

    _: KW_ONLY
    denoisers: Sequence[Denoiser] = (Denoiser("", 0.15, 3.0),)

    @classmethod
    def from_config(cls, config: ConfigDict, tokenizer: Tokenizer | None) -> SpanCorruption:
        options = config.objective
        one = Denoiser("", options.noise_density, options.mean_span)
        return cls(
            tokenizer,
            config.data.sequence_length,
            stride=config.data.stride,
            denoisers=read_denoisers(options.denoisers) or (one,),
            label_smoothing=options.label_smoothing,
            z_loss=options.z_loss,
        )

    @cached_property
    def lengths(self) -> tuple[int, int]:  # type: ignore[override]
        # A prefix has at most one token per byte, plus a word-start marker.
        longest = max(len(d.prefix.encode()) + bool(d.prefix) for d in self.denoisers)
        room = self.length - longest
        if longest and room < 3:
            raise UserError(
                f"--config.data.sequence_length={self.length} leaves no room after a prefix of "
                f"--config.objective.denoisers: use at least {longest + 3}"
            )
        n_raw = min(denoiser.lengths(room)[0] for denoiser in self.denoisers)
        return n_raw, max(denoiser.target_length(n_raw) for denoiser in self.denoisers)

    @property
    def n_extra_ids(self) -> int:  # type: ignore[override]
        special = self.special
        return special.n_extra_ids(special.bos, special.eos, *self._sentinels.tolist())

    def corrupt(
        self, tokens: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        several = len(self.denoisers) > 1
        at = int(rng.integers(len(self.denoisers))) if several else 0
        is_noise, eos = self.denoisers[at].mask(len(tokens), rng), self.special.eos
        source = np.append(replace_spans(tokens, is_noise, self._sentinels), eos)
        targets = np.append(replace_spans(tokens, ~is_noise, self._sentinels), eos)
        return np.concatenate([self._prefixes[at], source]), targets

    @cached_property
    def _prefixes(self) -> list[np.ndarray]:
        """Token ids of the prefixes: a single vocabulary entry, or the tokenized text."""
        found = []
        for denoiser in self.denoisers:
            name, tokenizer = denoiser.prefix, self.tokenizer
            known = tokenizer.token_id(name) if tokenizer and name else None
            ids: Sequence[int] | np.ndarray = [] if known is None else [known]
            if tokenizer and name and known is None:
                ids = tokenizer.encode(name)
            found.append(np.asarray(ids, np.int32))
        return found

    @cached_property
    def _sentinels(self) -> np.ndarray:
        """Ids of <extra_id_0>, <extra_id_1>, …, enough for the maximum number of spans.

        If the vocabulary lacks them, ids after its end are used, at least T5's hundred, in
        descending order as in T5.
        """
        of_spans = [d for d in self.denoisers if d.mean_span]
        n_raw = self.lengths[0]
        counts = (noise_counts(n_raw, d.density, d.mean_span)[1] for d in of_spans)
        n_spans = max(counts, default=1)
        tokenizer, special = self.tokenizer, self.special
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
