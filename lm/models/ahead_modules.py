"""Modules that predict tokens beyond the next one (DeepSeek-AI 2024b, arXiv 2412.19437, §2.2).

Module k reads the hidden state from which module k - 1 predicted token i + k, and that token;
it shares embeddings and output layer with the model. Only training uses these modules: the loss
that needs them creates them, and decoding leaves them out.

Shape letters: B batch, L length, D model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.kernels.dot_product_attention import AttentionMask
from lm.models.layers import make_norm
from lm.models.transformer import Stack
from lm.models.transformer_config import TransformerConfig
from lm.models.variables import MODEL_STATE, Params
from lm.models.wide_streams import project

AHEAD = "ahead"  # name of their parameters


class AheadModules(nn.Module):
    """One module per further token: a projection, and a block like the model's last one."""

    config: TransformerConfig
    deterministic: bool

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, next_BLD: Sequence[jax.Array], positions_BL: jax.Array, mask: Any
    ) -> list[jax.Array]:
        """Return the hidden states [B, L, D] that each module's logits are computed from.

        Args:
            x_BLD: hidden states of the model, normalized.
            next_BLD: for module k, from 1 on, the embeddings of the tokens k places ahead.
            positions_BL: positions of the hidden states.
            mask: mask of self-attention, as in the model's stack.
        """
        c, found = replace(self.config, dense_layers=0, expert_layers=()), []
        for i, token_BLD in enumerate(next_BLD):
            norms = make_norm(c, f"token_norm_{i}", "body"), make_norm(c, f"norm_{i}", "body")
            both = jnp.concatenate([norms[0](token_BLD), norms[1](x_BLD)], axis=-1)
            x_BLD = project(c, both, c.d_model, f"in_{i}", "body")
            stack = Stack(c, 1, self.deterministic, causal=True, name=f"stack_{i}")
            x_BLD = stack(x_BLD, positions_BL, mask)[0]
            found.append(x_BLD)
        return found


def hidden_ahead(
    model: Any, x_BLD: jax.Array, tokens_BL: Sequence[jax.Array], *text: Any
) -> list[jax.Array]:
    """Return the hidden states at which a decoder's modules predict further tokens.

    Args:
        model: the decoder, bound; the modules are initialized together with it.
        x_BLD: its hidden states.
        tokens_BL: for module k, from 1 on, the tokens k places ahead.
        *text: positions and segment ids [B, L] of the text, or None.
    """
    positions_BL, segment_ids_BL = text
    embedded = [model.embed(tokens, positions_BL) for tokens in tokens_BL]
    modules = AheadModules(
        model.config, model.deterministic, parent=model.scope.push(AHEAD, reuse=True)
    )
    mask = AttentionMask(True, segment_ids_BL)
    return modules(x_BLD, [x_BLD for x_BLD, _ in embedded], embedded[0][1], mask)


def without_ahead(params: Params) -> Params:
    """Return nested parameters and model state without these modules."""
    return {
        name: without_ahead(leaf) if name == MODEL_STATE else leaf
        for name, leaf in params.items()
        if name != AHEAD
    }
