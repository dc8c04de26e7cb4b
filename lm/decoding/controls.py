"""What decoding forbids or discourages, whichever way it chooses tokens.

Shape letters: B rows, T most new tokens, V vocabulary, W banned sequences, P longest of their
prefixes.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

NEG_INF = -jnp.inf
UNSET = -1  # in a buffer of new tokens, where none is written yet


@dataclass(frozen=True)
class Controls:
    """repetition_penalty 1, no banned sequences and min_length 0 change nothing.

    `min_length` tokens come before the end may. `banned` are sequences of token ids.
    """

    end_id: int | None = None
    repetition_penalty: float = 1.0
    banned: tuple[tuple[int, ...], ...] = ()
    min_length: int = 0

    def adjusted(self, logits_BV: jax.Array, written_BT: jax.Array) -> jax.Array:
        """The logits after the penalty for repeating what is written; nothing is ruled out."""
        if self.repetition_penalty == 1:
            return logits_BV
        return penalise_repeats(logits_BV, written_BT, self.repetition_penalty)

    def allowed(self, scores_BV: jax.Array, written_BT: jax.Array, n: jax.Array) -> jax.Array:
        """The scores with -inf for tokens that may not follow the `n` that are written."""
        if self.banned:
            forbidden_BV = ends_of_banned(written_BT, n, self.banned, scores_BV.shape[-1])
            scores_BV = jnp.where(forbidden_BV, NEG_INF, scores_BV)
        if self.min_length and self.end_id is not None:
            end_B = jnp.where(n < self.min_length, NEG_INF, scores_BV[:, self.end_id])
            scores_BV = scores_BV.at[:, self.end_id].set(end_B)
        return scores_BV


def penalise_repeats(logits_BV: jax.Array, written_BT: jax.Array, penalty: float) -> jax.Array:
    """Logits of written tokens divided by the penalty where positive, else multiplied by it.

    Keskar et al. 2019, section 4.1, which divides only: a negative logit would become likelier.
    """
    rows_B1 = jnp.arange(len(logits_BV))[:, None]
    # Out of bounds, so dropped; a negative index would count from the end.
    tokens_BT = jnp.where(written_BT == UNSET, logits_BV.shape[-1], written_BT)
    seen_BV = jnp.zeros(logits_BV.shape, bool).at[rows_B1, tokens_BT].set(True, mode="drop")
    penalised_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, penalised_BV, logits_BV)


def ends_of_banned(
    written_BT: jax.Array, n: jax.Array, banned: tuple[tuple[int, ...], ...], vocab_size: int
) -> jax.Array:
    """The tokens [B, V] that would complete a banned sequence begun by the last written ones."""
    longest = max(map(len, banned)) - 1
    prefixes_WP = np.full((len(banned), longest), UNSET, np.int32)
    for row, sequence in zip(prefixes_WP, banned, strict=True):
        row[longest - len(sequence) + 1 :] = sequence[:-1]
    before_BT = jnp.pad(written_BT, ((0, 0), (longest, 0)), constant_values=UNSET)
    last_BP = jax.lax.dynamic_slice_in_dim(before_BT, n, longest, axis=1)
    same_BWP = (last_BP[:, None] == prefixes_WP) | (prefixes_WP == UNSET)
    last_W = np.array([sequence[-1] for sequence in banned])
    forbidden_BV = jnp.zeros((len(written_BT), vocab_size), bool)
    return forbidden_BV.at[:, last_W].max(same_BWP.all(-1))
