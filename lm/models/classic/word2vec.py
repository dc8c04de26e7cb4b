"""Skip-gram model (Mikolov et al. 2013a, 2013b): two vectors a word, as centre and as context.

After training the word vectors are the table of the centres.

Shape letters: B batch, L centres, S contexts, D model, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.models.layers import Embedding
from lm.models.variables import InitConfig, Kind, Role
from lm.parallel.sharding import constrain


@dataclass(frozen=True)
class SkipGramConfig(InitConfig):
    """Skip-gram model; the meaning of each field is in `lm/config/keys.py`."""

    vocab_size: int
    d_model: int


class SkipGramModel(nn.Module):
    """Skip-gram model; nothing depends on `deterministic`."""

    config: SkipGramConfig
    deterministic: bool = True

    def setup(self) -> None:
        c = self.config
        role = Role(Kind.EMBEDDING, c.stream, "input")
        self.tokens = Embedding(c.vocab_size, c.d_model, "vocab", role, c.table_init, c.dtype)
        # From 0, as in word2vec's code: at first every pair is as likely as not.
        zeros, role = nn.initializers.zeros, replace(role, part="output")
        self.contexts = Embedding(c.vocab_size, c.d_model, "vocab", role, zeros, c.dtype)

    def __call__(self, centres_BL: jax.Array, contexts_BS: jax.Array) -> jax.Array:
        """Return the dot products of all centres with all contexts, [B, L, S] float32."""
        centres_BLD = constrain(self.tokens(centres_BL), "batch", "length", "embed")
        contexts_BSD = constrain(self.contexts(contexts_BS), "batch", "length", "embed")
        return jnp.einsum(
            "bld,bsd->bls", centres_BLD, contexts_BSD, preferred_element_type=jnp.float32
        )
