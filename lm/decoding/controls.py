"""Constraints on generated tokens, shared by beam search and sampling.

Shape letters: B rows, T maximum new tokens, V vocabulary, W banned sequences, P longest of their
prefixes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lm.config.registry import listed
from lm.data.special_tokens import special_tokens
from lm.data.tokenizer import Tokenizer
from lm.decoding.text_limits import TextLimits, text_limits
from lm.errors import UserError

UNSET = -1  # unwritten entry in a buffer of new tokens
START = -2  # in a banned sequence: the position before the first new token


@dataclass(frozen=True)
class Controls:
    """Constraints on new tokens; the defaults change nothing.

    Attributes:
        end_ids: end tokens.
        repetition_penalty: divisor of the logits of written tokens; above 1 discourages repeats.
        banned: sequences of token ids that are never generated; `START` stands before the output.
        min_length: minimum tokens before an end token is allowed.
        limits: constraints on the text: allowed words, a banned pattern, a grammar.
    """

    end_ids: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    banned: tuple[tuple[int, ...], ...] = ()
    min_length: int = 0
    limits: TextLimits | None = None

    @classmethod
    def from_config(
        cls, config: ConfigDict, tokenizer: Tokenizer, further_ends: Sequence[int] = ()
    ) -> Controls:
        """Return the controls of a resolved configuration.

        Args:
            config: configuration.
            tokenizer: tokenizer of the data.
            further_ends: additional end tokens.
        """
        decode = config.decode
        # Targets always end, if necessary with an id after the tokenizer's; documents may not.
        has_targets = "encoder_decoder" in config.model.family
        end_ids = tuple(dict.fromkeys((*further_ends, *tokenizer.stop_ids)))
        if has_targets and not end_ids:
            end_ids = (special_tokens(tokenizer).eos,)
        words = [word for word in map(str.strip, decode.banned.split(",")) if word]
        banned = *banned_sequences(tokenizer, words), *parse_sequences(decode.banned_tokens)
        limits = text_limits(decode, tokenizer, end_ids)
        return cls(end_ids, decode.repetition_penalty, banned, decode.min_length, limits)

    def penalized(self, logits_BV: jax.Array, written_BT: jax.Array) -> jax.Array:
        """Apply the repetition penalty to the logits."""
        if self.repetition_penalty == 1:
            return logits_BV
        return penalize_repeats(logits_BV, written_BT, self.repetition_penalty)

    def masked(self, scores_BV: jax.Array, written_BT: jax.Array, n: jax.Array) -> jax.Array:
        """Mask the scores of tokens that must not follow the `n` written ones with -inf."""
        if self.banned:
            forbidden_BV = ends_of_banned(written_BT, n, self.banned, scores_BV.shape[-1])
            scores_BV = jnp.where(forbidden_BV, -jnp.inf, scores_BV)
        if self.min_length and self.end_ids:
            is_end_V = np.isin(np.arange(scores_BV.shape[-1]), self.end_ids)
            scores_BV = jnp.where((n < self.min_length) & is_end_V, -jnp.inf, scores_BV)
        return self.limits.masked(scores_BV, written_BT, n) if self.limits else scores_BV

    def ends(self, tokens: jax.Array) -> jax.Array:
        """Return which tokens are end tokens, bool of the same shape."""
        ends = jnp.zeros(tokens.shape, bool)
        for end_id in self.end_ids:
            ends |= tokens == end_id
        return ends


def banned_sequences(tokenizer: Tokenizer, words: list[str]) -> tuple[tuple[int, ...], ...]:
    """Return the token ids of words, at the start of a text and after a space.

    A subword vocabulary may spell a word in other ways, which are not banned. A word missing from a
    word vocabulary cannot be generated anyway.
    """
    unknown = tokenizer.token_id("<unk>")
    encoded = (
        tuple(tokenizer.encode(text).tolist()) for word in words for text in (word, f" {word}")
    )
    return tuple(dict.fromkeys(ids for ids in encoded if ids and unknown not in ids))


def parse_sequences(text: str) -> tuple[tuple[int, ...], ...]:
    """Parse the value of `decode.banned_tokens`; UserError if it is malformed."""
    parts = listed(text)
    if wrong := [part for part in parts if not re.fullmatch(r"\^?\d{1,9}( +\d{1,9})*", part)]:
        raise UserError(
            f"--config.decode.banned_tokens: {wrong[0]!r} is neither a token id, such as 7, nor a "
            "sequence of them, such as '4 5' or, at the start of an output, ^6"
        )
    starts = ((START,) if part.startswith("^") else () for part in parts)
    ids = (map(int, part.removeprefix("^").split()) for part in parts)
    return tuple((*start, *sequence) for start, sequence in zip(starts, ids, strict=True))


def penalize_repeats(logits_BV: jax.Array, written_BT: jax.Array, penalty: float) -> jax.Array:
    """Divide the logits of written tokens by the penalty if positive, else multiply by it.

    Keskar et al. 2019, section 4.1, always divides, which would make negative logits more likely.
    """
    rows_B1 = jnp.arange(len(logits_BV))[:, None]
    # Out-of-bounds indices are dropped; a negative index would count from the end.
    tokens_BT = jnp.where(written_BT == UNSET, logits_BV.shape[-1], written_BT)
    seen_BV = jnp.zeros(logits_BV.shape, bool).at[rows_B1, tokens_BT].set(True, mode="drop")
    penalized_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, penalized_BV, logits_BV)


def ends_of_banned(
    written_BT: jax.Array, n: jax.Array, banned: tuple[tuple[int, ...], ...], vocab_size: int
) -> jax.Array:
    """Return which tokens [B, V] would complete a banned sequence.

    Args:
        written_BT: new tokens so far, then `UNSET`.
        n: number of new tokens so far, scalar.
        banned: sequences of token ids, which `START` may precede.
        vocab_size: V.
    """
    longest = max(map(len, banned)) - 1
    prefixes_WP = np.full((len(banned), longest), UNSET, np.int32)
    for row, sequence in zip(prefixes_WP, banned, strict=True):
        row[longest - len(sequence) + 1 :] = sequence[:-1]
    before_BT = jnp.pad(written_BT, ((0, 0), (longest, 0)), constant_values=START)
    last_BP = jax.lax.dynamic_slice_in_dim(before_BT, n, longest, axis=1)
    same_BWP = (last_BP[:, None] == prefixes_WP) | (prefixes_WP == UNSET)
    last_W = np.array([sequence[-1] for sequence in banned])
    forbidden_BV = jnp.zeros((len(written_BT), vocab_size), bool)
    return forbidden_BV.at[:, last_W].max(same_BWP.all(-1))
