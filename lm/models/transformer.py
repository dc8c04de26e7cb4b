"""The one Transformer: a block, and a stack of blocks scanned over their stacked parameters.

Shape letters: B batch, L length, S source length, D model, N layers, G key/value heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.core.scope import LazyRng
from jax.ad_checkpoint import checkpoint_name

from lm.kernels.dot_product_attention import AttentionMask
from lm.models.attention import Attention
from lm.models.cache import Cache, KeyValue
from lm.models.layers import FeedForward, make_norm
from lm.models.moe import MixtureOfExperts
from lm.models.positions import RelativeBias, layer_angles
from lm.models.sown import COLLECTIONS
from lm.models.transformer_config import TransformerConfig
from lm.parallel.pipeline import run_pipeline
from lm.parallel.sharding import constrain, current_pipeline

HOST = {"offload_src": "device", "offload_dst": "pinned_host"}
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload_dots": jax.checkpoint_policies.offload_dot_with_no_batch_dims(**HOST),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=["block_input"], **HOST
    ),
}


@flax.struct.dataclass
class StackInputs:
    """What all blocks of a stack have in common.

    Local layers rotate by angles of their own if there are any. A stack with cross-attention has
    `source_visibility`, and either the encoder's output or, in later steps of decoding, nothing:
    then each layer has keys and values of it.
    """

    visibility: AttentionMask
    angles_BLK: jax.Array | None = None
    local_angles_BLK: jax.Array | None = None
    bias_HLS: jax.Array | None = None
    encoded_BSD: jax.Array | None = None
    source_visibility: AttentionMask | None = None


@flax.struct.dataclass
class LayerInputs:
    """What a layer has of its own beside parameters; of several layers, their arrays stacked.

    Its number, where keys and values are cached; whether it is global, where some have a window;
    and its keys and values of the source, cached.
    """

    number: jax.Array | None = None
    is_global: jax.Array | None = None
    source: KeyValue | None = None


# What goes from layer to layer: [B, L, D], and the cached keys and values of all layers.
ScanCarry = tuple[jax.Array, KeyValue | None]


class Block(nn.Module):
    """x + sublayer(norm(x)) for each sublayer; "post": norm(x + sublayer(x)); "both":
    x + post_norm(sublayer(norm(x))).

    The sublayers: self-attention, cross-attention where there is a source, feed-forward, of experts
    if the block is `sparse`. When decoding it gives its keys and values of a source just read.
    """

    config: TransformerConfig
    deterministic: bool
    kernel: str
    sparse: bool

    @nn.compact
    def __call__(
        self, carried: ScanCarry, around: StackInputs, layer: LayerInputs
    ) -> tuple[ScanCarry, KeyValue | None]:
        c = self.config
        x_BLD, own = carried
        source = layer.source
        x_BLD = checkpoint_name(x_BLD, "block_input")

        def self_attention(y_BLD: jax.Array) -> jax.Array:
            nonlocal own
            attend = Attention(c, self.deterministic, self.kernel, name="attention")
            seen = replace(around.visibility, window=c.window, is_global=layer.is_global)
            angles_BLK = around.angles_BLK
            if around.local_angles_BLK is not None:
                assert angles_BLK is not None
                assert layer.is_global is not None
                angles_BLK = jnp.where(layer.is_global, angles_BLK, around.local_angles_BLK)
            y_BLD, own = attend.to_itself(
                y_BLD, seen, angles_BLK, around.bias_HLS, own, layer.number
            )
            return y_BLD

        def cross_attention(y_BLD: jax.Array) -> jax.Array:
            nonlocal source
            attend = Attention(c, self.deterministic, self.kernel, name="cross_attention")
            if around.encoded_BSD is not None:
                source = attend.keys_values(around.encoded_BSD)
            assert source is not None
            assert around.source_visibility is not None
            return attend.to_source(y_BLD, source, around.source_visibility)

        feed_forward: Callable[[jax.Array], jax.Array]
        if self.sparse:
            segments_BL = around.visibility.segments_BL
            is_token_BL = None if segments_BL is None else segments_BL != 0
            experts = MixtureOfExperts(c, self.deterministic, name="feed_forward")
            feed_forward = partial(experts, is_token_BL=is_token_BL)
        else:
            feed_forward = FeedForward(c, self.deterministic, name="feed_forward")
        sublayers: dict[str, Callable[[jax.Array], jax.Array]] = {
            "attention": self_attention,
            "cross_attention": cross_attention,
            "feed_forward": feed_forward,
        }
        if around.source_visibility is None:
            del sublayers["cross_attention"]
        for name, sublayer in sublayers.items():
            norm = make_norm(c, f"{name}_norm")
            y_BLD = sublayer(x_BLD if c.norm_placement == "post" else norm(x_BLD))
            if c.norm_placement == "both":
                y_BLD = make_norm(c, f"{name}_post_norm")(y_BLD)
            y_BLD = nn.Dropout(c.dropout, deterministic=self.deterministic)(y_BLD)
            x_BLD = constrain(x_BLD + y_BLD, "batch", "residual_length", "embed")
            x_BLD = norm(x_BLD) if c.norm_placement == "post" else x_BLD
        just_read = own is not None and around.encoded_BSD is not None
        return (x_BLD, own), source if just_read else None


class Pattern(nn.Module):
    """The blocks that repeat: `experts_every` of them, of which the last has experts if `sparse`.

    A model whose blocks are all alike has no such names in the paths of its parameters. The names
    tell which layers of the stack are in a parameter's first axis (`optim/parameter_groups.py`).
    """

    config: TransformerConfig
    deterministic: bool
    kernel: str
    sparse: bool

    @nn.compact
    def __call__(
        self, carried: ScanCarry, around: StackInputs, layers: LayerInputs
    ) -> tuple[ScanCarry, KeyValue | None]:
        c, n = self.config, self.config.pattern
        block, sources = with_remat(Block, c.remat), []
        for i in range(n):
            sparse = self.sparse and i == n - 1
            run = block(c, self.deterministic, self.kernel, sparse, name=f"{i}_of_{n}")
            layer = jax.tree.map(lambda part, i=i: part[i], layers)
            carried, source = run(carried, around, layer)
            sources.append(source)
        return carried, jax.tree.map(lambda *parts: jnp.stack(parts), *sources)


def with_remat(block: type[nn.Module], remat: str) -> Any:
    """`block` whose backward pass recomputes what the policy says."""
    if remat == "none":
        return block
    return nn.remat(block, policy=REMAT_POLICIES[remat], prevent_cse=False)


class Stack(nn.Module):
    """`n_layers` blocks; their parameters are stacked on a first axis "layers"."""

    config: TransformerConfig
    n_layers: int
    deterministic: bool
    causal: bool

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        positions_BL: jax.Array,
        visibility: AttentionMask,
        cache: Cache | None = None,
        encoded_BSD: jax.Array | None = None,
        source_segments_BS: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """The stack's output, normalised unless its blocks are "post", and the cache after it.

        With an encoder's output, or a cache that holds its keys and values, blocks attend to it;
        `source_segments_BS` are its segments.
        """
        c = self.config
        if cache is not None and encoded_BSD is None and cache.source is not None:
            source_segments_BS = cache.source.segment_ids_BT
        around = self._surroundings(x_BLD, positions_BL, visibility, cache)
        if source_segments_BS is not None:
            seen = AttentionMask(False, visibility.segments_BL, source_segments_BS)
            around = replace(around, encoded_BSD=encoded_BSD, source_visibility=seen)

        layers = LayerInputs(is_global=jax.tree.map(jnp.asarray, c.is_global(self.n_layers)))
        if cache is None and current_pipeline():
            x_BLD = self._pipeline(x_BLD, around, layers)
        elif cache is None:
            (x_BLD, _), _ = self._scan((x_BLD, None), around, layers)
        else:
            number_N = jnp.arange(self.n_layers)
            layers = replace(layers, number=number_N, source=cache.of_source)
            (x_BLD, own), source = self._scan((x_BLD, cache.own), around, layers)
            assert own is not None
            cache = cache.after(own, x_BLD.shape[1], source, source_segments_BS)
        if c.norm_placement != "post":
            x_BLD = make_norm(c, "final_norm")(x_BLD)
        if c.final_dropout:
            x_BLD = nn.Dropout(c.dropout, deterministic=self.deterministic)(x_BLD)
        return x_BLD.astype(c.dtype), cache

    def _surroundings(
        self,
        x_BLD: jax.Array,
        positions_BL: jax.Array,
        visibility: AttentionMask,
        cache: Cache | None,
    ) -> StackInputs:
        """What self-attention sees, turns by and adds."""
        c, L = self.config, x_BLD.shape[1]
        around = StackInputs(visibility)
        if c.positions == "rotary":
            if cache is None and current_pipeline():  # what goes beside the rows has as many
                positions_BL = jnp.broadcast_to(positions_BL, x_BLD.shape[:2])
            angles_BLK, local_BLK = layer_angles(c, positions_BL)
            around = replace(around, angles_BLK=angles_BLK, local_angles_BLK=local_BLK)
        if c.positions == "relative":
            n_keys = L if cache is None else cache.keys_NBSGK.shape[2]
            bias = RelativeBias(c, not self.causal, name="relative_bias")
            around = replace(around, bias_HLS=bias(L, n_keys, visibility.offset))
        return around

    @property
    def _layer(self) -> tuple[type[nn.Module], tuple[Any, ...]]:
        """What is repeated, a block or the pattern of several, and its fields."""
        c = self.config
        layer = with_remat(Block, c.remat) if c.pattern == 1 else Pattern
        return layer, (c, self.deterministic, c.attention, c.n_experts > 0)

    @property
    def _n_scan_steps(self) -> int:
        """How often it is repeated."""
        return self.n_layers // self.config.pattern

    def _by_scan_step(self, layers: LayerInputs) -> LayerInputs:
        """Arrays [n_layers, …] as what is repeated takes them."""
        n = self.config.pattern
        if n == 1:
            return layers
        return jax.tree.map(lambda x: x.reshape(-1, n, *x.shape[1:]), layers)

    def _scan(
        self, carried: ScanCarry, around: StackInputs, layers: LayerInputs
    ) -> tuple[ScanCarry, KeyValue | None]:
        """The layers one after the other, as a loop over their parameters; and their keys and
        values of a source just read."""
        c = self.config
        layer, settings = self._layer
        run = nn.scan(
            layer,
            variable_axes=dict.fromkeys(("params", "intermediates", *COLLECTIONS), 0),  # type: ignore[arg-type]
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, 0),
            length=self._n_scan_steps,
            unroll=max(1, (c.scan_unroll or self.n_layers) // c.pattern),
            metadata_params={nn.PARTITION_NAME: "layers"},
            # The check traces a layer twice, and would give it the dropout of a second call.
            check_constancy_invariants=self.is_initializing(),
        )(*settings, name="layers")
        carried, source = run(carried, around, self._by_scan_step(layers))
        if c.pattern > 1:
            source = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), source)
        return carried, source

    def _pipeline(self, x_BLD: jax.Array, around: StackInputs, layers: LayerInputs) -> jax.Array:
        """What `_scan` gives, by the pipeline of the mesh."""
        layer, settings = self._layer
        block = layer(*settings, parent=None)
        bias_HLS, around = around.bias_HLS, replace(around, bias_HLS=None)
        by_row = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else None, around)

        assert self.scope is not None
        collections = self.scope.mutable or []
        # The keys that nn.scan gives: those of the layers are split before the path is folded in.
        rng = keys_N = None
        if not self.deterministic:
            rng = LazyRng.create(self.scope.rngs["dropout"], "layers")
            keys_N = jax.random.split(rng.rng, self._n_scan_steps)

        def run_layer(
            of_layer: Any, key: jax.Array | None, x_BLD: jax.Array, by_row: Any, bias_HLS: Any
        ) -> tuple[jax.Array, Any]:
            params, own = of_layer
            here = jax.tree.map(
                lambda row, leaf: leaf if row is None else row,
                by_row,
                around,
                is_leaf=lambda leaf: leaf is None,
            )
            here = replace(here, bias_HLS=bias_HLS)
            rngs: Any = {} if rng is None else {"dropout": rng.replace(rng=key)}
            inputs = ((x_BLD, None), here, own)
            output: Any = block.apply({"params": params}, *inputs, rngs=rngs, mutable=collections)
            ((x_BLD, _), _), reported = output
            return x_BLD, reported

        of_layers = (self.variables["params"]["layers"], self._by_scan_step(layers))
        c = self.config
        unroll = c.scan_unroll and max(1, c.scan_unroll // c.pattern)
        x_BLD, reported = run_pipeline(
            run_layer, of_layers, keys_N, x_BLD, by_row, bias_HLS, unroll
        )
        for collection, values in reported.items():
            self.put_variable(collection, "layers", values)
        return x_BLD
