"""Base class of the Transformer families, and the decoder-only language model.

The base has embeddings, an output layer, and task heads. A head that an objective's loss never
calls has no parameters: a model is pretrained without a classifier, and fine-tuned without the
next-sentence head.

Shape letters: B batch, L length, D model, V vocabulary, C classes.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.kernels.dot_product_attention import AttentionMask
from lm.kernels.elementwise import softcap
from lm.models.cache import Cache, init_cache
from lm.models.layers import Embedding, Linear, make_norm
from lm.models.task_heads import TaskHeads
from lm.models.transformer import Stack
from lm.models.transformer_config import TransformerConfig
from lm.models.variables import Kind, Role
from lm.parallel.mesh import constrain


class Model(TaskHeads):
    """Embeddings, output layer and task heads."""

    def setup(self) -> None:
        c = self.config
        table = Role(Kind.EMBEDDING, c.stream, "input")
        tokens = Role(Kind.EMBEDDING, "predicted", "input", tied=c.tie_embeddings)
        width = c.embedding_size or c.d_model
        self.tokens = Embedding(c.vocab_size, width, "vocab", tokens, c.table_init, c.dtype)
        if c.positions == "learned":
            self.positions = position_table(c)
        if c.token_types:
            self.types = Embedding(c.token_types, width, "types", table, c.table_init, c.dtype)
        if c.embedding_norm:
            self.embedding_norm = make_norm(c, part="input")
        if c.embedding_size:
            from lm.models.embedding_projections import embedding_projections

            self.embedding_projection, self.output_projection = embedding_projections(c)
        self.dropout = nn.Dropout(c.dropout, deterministic=self.deterministic)
        if not c.tie_embeddings:
            head = Role(Kind.HEAD, "predicted", "output")
            self.head = self._linear(c.vocab_size, "vocab", head, False, self.output_width)
        self.pooler = self._linear(c.d_model, "pooled", Role(Kind.MATRIX, "text", "task"))
        pretraining = Role(Kind.HEAD, "text", "pretraining")
        self.sentence_head = self._linear(2, "classes", pretraining)
        self.classifier = self._linear(c.n_classes, "classes", Role(Kind.HEAD, "text", "task"))
        self.span_head = self._linear(2, "classes", Role(Kind.HEAD, c.stream, "task"))

    @property
    def output_width(self) -> int:
        """Width of the input of an untied output layer."""
        return self.config.d_model

    def _linear(
        self, n_out: int, name: str, role: Role, bias: bool = True, n_in: int = 0
    ) -> Linear:
        c = self.config
        std = c.std(c.d_model, n_out) if name == "pooled" else c.output_std(n_out)
        init, names = c.kernel_init(std), ("embed", name)
        shapes = (n_in or c.d_model,), (n_out,)
        return Linear(*shapes, names, role, bias, init, c.dtype, out_dtype=jnp.float32)

    def embed(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array | None = None,
        types_BL: jax.Array | None = None,
        names: tuple[str, ...] = ("tokens", "positions", "embedding_norm", "embedding_projection"),
    ) -> tuple[jax.Array, jax.Array]:
        """Return the embedded tokens [B, L, D] and their positions, by default 0 … L-1.

        `names` are those of the token table and, if the model has them, the position table, norm
        and projection.
        """
        c, table, norm, project = self.config, *(getattr(self, name, None) for name in names[1:])
        x_BLD = getattr(self, names[0])(tokens_BL)
        scale = (c.d_model / c.width_ratio) ** 0.5 if c.scale_embeddings else 1.0
        if scale * c.embedding_multiplier != 1:
            x_BLD *= jnp.asarray(scale * c.embedding_multiplier, c.dtype)
        if table and positions_BL is None:
            x_BLD += table.first(c.position_offset + tokens_BL.shape[1])[c.position_offset :]
        elif table and positions_BL is not None:
            x_BLD += table(positions_BL + c.position_offset)
        if positions_BL is None:
            positions_BL = jnp.arange(tokens_BL.shape[1])[None]
        if c.positions == "sinusoidal":
            from lm.models.positions import sinusoidal

            x_BLD += sinusoidal(positions_BL, c.d_model).astype(c.dtype)
        if c.token_types:
            if types_BL is None or c.token_types == 1:
                types_BL = jnp.zeros_like(tokens_BL)
            x_BLD += self.types(types_BL)
        if norm:
            x_BLD = norm(x_BLD)
        x_BLD = self.dropout(x_BLD)
        x_BLD = constrain(project(x_BLD) if project else x_BLD, "rows", "residual_length", "embed")
        return x_BLD, positions_BL

    def logits(self, x_BLD: jax.Array) -> jax.Array:
        """Return the logits of the vocabulary [B, L, V], float32."""
        c = self.config
        scaled = c.tie_embeddings and c.scale_logits
        scale = (c.d_model / c.width_ratio) ** -0.5 if scaled else 1.0
        x_BLD = self._scale_output(x_BLD) * jnp.asarray(scale / c.logits_scaling, x_BLD.dtype)
        if c.embedding_size and c.tie_embeddings and x_BLD.shape[-1] != c.embedding_size:
            x_BLD = self.output_projection(x_BLD)
        logits_BLV = self.tokens.attend(x_BLD) if c.tie_embeddings else self.head(x_BLD)
        logits_BLV = constrain(logits_BLV, "rows", "length", "vocab")
        return softcap(logits_BLV, c.logit_softcap) if c.logit_softcap else logits_BLV

    def _scale_output(self, x_BLD: jax.Array) -> jax.Array:
        """Apply the output multiplier of muP (Yang et al. 2022, Table 8)."""
        return x_BLD * jnp.asarray(1 / self.config.width_ratio, x_BLD.dtype)


def position_table(config: TransformerConfig) -> Embedding:
    """Build the table of learned positions for the config's stream."""
    c, role = config, Role(Kind.EMBEDDING, config.stream, "input")
    rows = c.max_length + c.position_offset
    width = c.embedding_size or c.d_model
    return Embedding(rows, width, "positions", role, c.table_init, c.dtype)


class Decoder(Model):
    """Decoder-only Transformer."""

    def setup(self) -> None:
        super().setup()
        self.stack = Stack(self.config, self.config.n_layers, self.deterministic, causal=True)

    def __call__(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array | None = None,
        segment_ids_BL: jax.Array | None = None,
        prefix_BL: jax.Array | None = None,
    ) -> jax.Array:
        """Return the logits [B, L, V] of the next tokens, float32; arguments as for `hidden`."""
        return self.logits(
            self.hidden(tokens_BL, positions_BL, segment_ids_BL, prefix_BL=prefix_BL)
        )

    def hidden(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array | None = None,
        segment_ids_BL: jax.Array | None = None,
        types_BL: jax.Array | None = None,
        prefix_BL: jax.Array | None = None,
    ) -> jax.Array:
        """Return the hidden states that the logits are computed from, [B, L, D].

        Args:
            tokens_BL: token ids.
            positions_BL: positions; default 0 … L-1.
            segment_ids_BL: segments, which do not attend to each other; default: one per row.
            types_BL: token types.
            prefix_BL: true for tokens that earlier ones of their segment attend to as well.
        """
        x_BLD, positions_BL = self.embed(tokens_BL, positions_BL, types_BL)
        mask = AttentionMask(True, segment_ids_BL, prefix_BS=prefix_BL)
        return self.stack(x_BLD, positions_BL, mask)[0]

    def decode(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array,
        segment_ids_BL: jax.Array,
        cache: Cache,
        prefix_BL: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Return the logits [B, L, V] of tokens after those in the cache, and the cache with them.

        Args:
            tokens_BL: token ids.
            positions_BL: their positions.
            segment_ids_BL: their segments; 0 is padding.
            cache: cache of the tokens before them.
            prefix_BL: true for tokens that earlier ones attend to as well; in the first call only.
        """
        cache = cache.with_segments(segment_ids_BL)
        if prefix_BL is not None:
            room = cache.segment_ids_BS.shape[1] - prefix_BL.shape[1]
            prefix_BL = jnp.pad(prefix_BL, ((0, 0), (0, room)))
        mask = AttentionMask(
            True, segment_ids_BL, cache.segment_ids_BS, cache.index, prefix_BS=prefix_BL
        )
        x_BLD, positions_BL = self.embed(tokens_BL, positions_BL)
        x_BLD, after = self.stack(x_BLD, positions_BL, mask, cache)
        assert after is not None
        return self.logits(x_BLD), after

    def empty_cache(self, batch: int, length: int) -> Cache:
        """Return a cache for `batch` rows of up to `length` tokens."""
        return init_cache(self.config, self.config.n_layers, batch, length)
