"""Transformer blocks, and a stack of them scanned over stacked parameters.

Shape letters: B batch, L query length, S source length, D model, W width of a block's input,
N layers, H heads, G key/value heads, K head dim.
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
from jax.ad_checkpoint import checkpoint_name

from lm.config.registries import MIXERS
from lm.config.rules import POSITION_BIASES
from lm.kernels.dot_product_attention import AttentionMask
from lm.models.attention import MixerInputs, Rotation, rotations
from lm.models.cache import Cache, Layer, cache_indices
from lm.models.cross_attention import CrossAttention
from lm.models.layers import FeedForward, make_norm
from lm.models.remat import REMAT_POLICIES
from lm.models.transformer_config import LayerType, Segment, TransformerConfig, segments
from lm.models.variables import COLLECTIONS, MODEL_STATE
from lm.parallel.mesh import constrain, current_pipeline


@flax.struct.dataclass
class StackInputs:
    """Inputs that all blocks of a stack share.

    Attributes:
        mask: mask of self-attention, without windows.
        rotations: RoPE of all layers.
        bias_HLS: position bias of the scores, as in `MixerInputs`; with `relative_per_layer` the
            distances that layers compute it from.
        encoded_BSD: encoder output; None in later decoding steps, which read cached keys.
        source_mask: mask of cross-attention; None in a stack without it.
    """

    mask: AttentionMask
    rotations: Rotation | None = None
    bias_HLS: jax.Array | None = None
    encoded_BSD: jax.Array | None = None
    source_mask: AttentionMask | None = None


@flax.struct.dataclass
class LayerInputs:
    """Per-layer inputs; for several layers, arrays stacked on a first axis.

    Attributes:
        cache_index: index of the layer in the cache of its token mixer; () if the cache is its own.
        is_global: true if the layer ignores the window, in stacks where only some do.
        is_nope: true if the layer has no positions, in stacks where only some have them.
        number: number of the layer, from 0, where the residual stream is wide.
        source: cached cross-attention keys and values, heads first.
    """

    cache_index: Layer | None = None
    is_global: jax.Array | None = None
    is_nope: jax.Array | None = None
    number: jax.Array | None = None
    source: Any = None


# Residual stream [B, L, W], and the caches of all layers by token mixer.
ScanCarry = tuple[jax.Array, dict[str, Any] | None]
# Carry after some layers, and their cross-attention keys and values if they were just computed.
BlockOutput = tuple[ScanCarry, Any]


class Block(nn.Module):
    """Transformer block: token mixer, cross-attention with a source, feed-forward if any.

    Each sublayer computes, by `norm_placement`, "pre": x + sublayer(norm(x)); "post":
    norm(x + sublayer(x)); "both": x + post_norm(sublayer(norm(x))); "output":
    x + post_norm(sublayer(x)).

    Other residual streams than the sum are in `wide_streams.py`.
    """

    config: TransformerConfig
    deterministic: bool
    layer_type: LayerType

    @nn.compact
    def __call__(self, carry: ScanCarry, inputs: StackInputs, layer: LayerInputs) -> BlockOutput:
        c, kind = self.config, self.layer_type
        x_BLW, caches = carry
        source = layer.source
        x_BLW, stream = checkpoint_name(x_BLW, "block_input"), None

        def self_attention(y_BLW: jax.Array) -> jax.Array:
            nonlocal caches
            mixer = MIXERS[kind.mixer](c, self.deterministic, y_BLW.shape[-1], name="attention")
            mask = replace(inputs.mask, window=c.window, is_global=layer.is_global)
            mixer_inputs = MixerInputs(mask, bias_HLS=inputs.bias_HLS)
            if c.relative_per_layer and c.positions == "relative":
                from lm.models.positions import layer_bias

                mixer_inputs = layer_bias(c, mixer_inputs)
            if inputs.rotations is not None:
                rotation = inputs.rotations.of_layer(layer.is_global, layer.is_nope)
                mixer_inputs = replace(mixer_inputs, rotation=rotation)
            if stream is not None:
                mixer_inputs = stream.mix_values(mixer, y_BLW, mixer_inputs)
            if caches is None:
                return mixer(y_BLW, mixer_inputs, None, None)[0]
            y_BLD, cache = mixer(y_BLW, mixer_inputs, caches[kind.mixer], layer.cache_index)
            caches = caches | {kind.mixer: cache}
            return y_BLD

        def cross_attention(y_BLW: jax.Array) -> jax.Array:
            nonlocal source
            fields: Any = c, self.deterministic, y_BLW.shape[-1], c.d_model, "source"
            attend = CrossAttention(*fields, name="cross_attention")
            assert inputs.source_mask is not None
            if inputs.encoded_BSD is not None:
                source = attend.keys_values(inputs.encoded_BSD)
            return attend(y_BLW, source, inputs.source_mask, inputs.encoded_BSD is None)

        feed_forward: Callable[[jax.Array], jax.Array] | None = None
        if kind.feed_forward == "experts":
            from lm.models.moe import MixtureOfExperts

            segments_BL = inputs.mask.segments_BL
            is_token_BL = None if segments_BL is None else segments_BL != 0
            experts = MixtureOfExperts(c, self.deterministic, name="feed_forward")
            feed_forward = partial(experts, is_token_BL=is_token_BL)
        elif kind.feed_forward == "dense":
            feed_forward = FeedForward(c, self.deterministic, name="feed_forward")
        sublayers: dict[str, Callable[[jax.Array], jax.Array] | None] = {
            "attention": self_attention,
            "cross_attention": None if inputs.source_mask is None else cross_attention,
            "feed_forward": feed_forward,
        }
        present = {name: sublayer for name, sublayer in sublayers.items() if sublayer is not None}

        def run(name: str, x_BLW: jax.Array) -> jax.Array:
            is_normed = c.norm_placement in ("pre", "both")
            is_normed &= name not in kind.raw_input
            y_BLD = present[name](make_norm(c, f"{name}_norm")(x_BLW) if is_normed else x_BLW)
            if c.norm_placement in ("both", "output"):
                y_BLD = make_norm(c, f"{name}_post_norm")(y_BLD)
            if c.residual_multiplier != 1:
                y_BLD *= jnp.asarray(c.residual_multiplier, y_BLD.dtype)
            return nn.Dropout(c.dropout, deterministic=self.deterministic)(y_BLD)

        if c.is_wide:
            from lm.models.wide_streams import STREAMS

            stream = STREAMS[c.residual](self, x_BLW, layer.number)
            x_BLW = stream.through(tuple(present), run)
        for name in () if c.is_wide else present:
            x_BLW = constrain(x_BLW + run(name, x_BLW), "batch", "residual_length", "embed")
            if c.norm_placement == "post":
                x_BLW = make_norm(c, f"{name}_norm")(x_BLW)
        is_prefill = caches is not None and inputs.encoded_BSD is not None
        return (x_BLW, caches), source if is_prefill else None


class Blocks(nn.Module):
    """Blocks of different types, one after the other.

    In a period that a scan repeats they are named "{i}_of_{n}", which identifies the layers on the
    first axis of a parameter (`lm/models/parameter_groups.py`); a model whose layers are all alike
    has no such names in its parameter paths. Outside of a scan blocks may have any parameter
    shapes, and are named by their numbers in the stack.
    """

    config: TransformerConfig
    deterministic: bool
    layer_types: tuple[LayerType, ...]
    names: tuple[str, ...]
    in_scan: bool = True

    @nn.compact
    def __call__(self, carry: ScanCarry, inputs: StackInputs, layers: LayerInputs) -> BlockOutput:
        sources = []
        # Outside of a loop, XLA's CSE would merge the recomputation with the forward pass.
        block = with_remat(Block, self.config.remat, prevent_cse=not self.in_scan)
        for i, (layer_type, name) in enumerate(zip(self.layer_types, self.names, strict=True)):
            run = block(self.config, self.deterministic, layer_type, name=name)
            carry, source = run(carry, inputs, jax.tree.map(lambda x, i=i: x[i], layers))
            sources.append(source)
        return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *sources)


def with_remat(block: type[nn.Module], remat: str, prevent_cse: bool = False) -> Any:
    """Return `block` with rematerialization in the backward pass by the policy `remat`."""
    if remat == "none":
        return block
    return nn.remat(block, policy=REMAT_POLICIES[remat], prevent_cse=prevent_cse)


class Stack(nn.Module):
    """Stack of `n_layers` blocks, run in the segments of its layer types.

    The parameters of a scanned segment are stacked on a first axis "layers".
    """

    config: TransformerConfig
    n_layers: int
    deterministic: bool
    causal: bool

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        positions_BL: jax.Array,
        mask: AttentionMask,
        cache: Cache | None = None,
        encoded_BSD: jax.Array | None = None,
        source_segments_BS: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Run the blocks.

        Args:
            x_BLD: embedded tokens.
            positions_BL: their positions.
            mask: mask of self-attention, without windows.
            cache: cache of the tokens before these, when decoding.
            encoded_BSD: encoder output, which the blocks attend to; None if the cache holds its
                keys and values.
            source_segments_BS: segment ids of `encoded_BSD`.

        Returns:
            Output [B, L, D], normalized unless `norm_placement` is "post", and the cache with
            these tokens.
        """
        c = self.config
        if cache is not None and encoded_BSD is None and cache.source is not None:
            source_segments_BS = cache.source.segment_ids_BS
        inputs = self._inputs(x_BLD, positions_BL, mask, cache)
        if source_segments_BS is not None:
            source_mask = AttentionMask(False, mask.segments_BL, source_segments_BS)
            inputs = replace(inputs, encoded_BSD=encoded_BSD, source_mask=source_mask)

        layer_types = c.layer_types(self.n_layers)
        kinds = c.is_global(self.n_layers), c.is_nope(self.n_layers)
        layers = LayerInputs(None, *jax.tree.map(jnp.asarray, kinds))
        if c.is_wide:
            from lm.models.wide_streams import narrow, widen

            x_BLD = widen(c, x_BLD)
            layers = replace(layers, number=jnp.arange(self.n_layers))
        if cache is None and current_pipeline():
            from lm.parallel.pipeline import scan_as_pipeline

            (segment,) = segments(layer_types)
            block, fields = self._scanned(segment)
            x_BLD = scan_as_pipeline(
                self,
                segment.name,
                block(*fields, parent=None),
                segment.n_repeats,
                x_BLD,
                inputs,
                _by_scan_step(segment, layers),
                c.scan_unroll and max(1, c.scan_unroll // len(segment.period)),
            )
        elif cache is None:
            (x_BLD, _), _ = self._run((x_BLD, None), inputs, layers)
        else:
            source = None if cache.source is None else cache.source.keys_values
            indices = jnp.asarray(cache_indices(layer_types))
            layers = replace(layers, cache_index=indices, source=source)
            (x_BLD, mixers), source = self._run((x_BLD, cache.mixers), inputs, layers)
            assert mixers is not None
            cache = cache.advance(c, mixers, x_BLD.shape[1], source, source_segments_BS)
        if c.is_wide:
            x_BLD = narrow(c, x_BLD)
        elif c.norm_placement != "post":
            x_BLD = make_norm(c, "final_norm")(x_BLD)
        if c.final_dropout:
            x_BLD = nn.Dropout(c.dropout, deterministic=self.deterministic)(x_BLD)
        return x_BLD.astype(c.dtype), cache

    def _inputs(
        self, x_BLD: jax.Array, positions_BL: jax.Array, mask: AttentionMask, cache: Cache | None
    ) -> StackInputs:
        """Build the attention mask, RoPE and position bias."""
        c, L = self.config, x_BLD.shape[1]
        n_keys = L if cache is None else cache.segment_ids_BS.shape[1]
        if cache is None and current_pipeline():  # positions of every row are needed
            positions_BL = jnp.broadcast_to(positions_BL, x_BLD.shape[:2])
        if c.window_chunks and n_keys > c.window:
            mask = replace(mask, window_BL=positions_BL % c.window + 1)
        inputs = StackInputs(mask)
        if c.positions == "rotary":
            inputs = replace(inputs, rotations=rotations(c, positions_BL, mask.segments_BL))
        if c.positions in POSITION_BIASES:
            from lm.models.positions import position_bias

            bias = position_bias(c, not self.causal, L, n_keys, mask.offset, cache is None)
            inputs = replace(inputs, bias_HLS=bias)
        return inputs

    def _run(self, carry: ScanCarry, inputs: StackInputs, layers: LayerInputs) -> BlockOutput:
        """Run all segments."""
        parts = segments(self.config.layer_types(self.n_layers))
        if len(parts) == 1:
            return self._run_segment(parts[0], carry, inputs, layers)
        sources = []
        for segment in parts:
            first, last = segment.first, segment.first + segment.n_layers
            segment_layers = jax.tree.map(lambda x, a=first, b=last: x[a:b], layers)
            carry, source = self._run_segment(segment, carry, inputs, segment_layers)
            sources.append(source)
        return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *sources)

    def _run_segment(
        self, segment: Segment, carry: ScanCarry, inputs: StackInputs, layers: LayerInputs
    ) -> BlockOutput:
        """Run one segment, as a scan over stacked parameters if it is scannable."""
        c = self.config
        if not segment.is_scanned:
            names = tuple(str(segment.first + i) for i in range(segment.n_layers))
            fields = c, self.deterministic, segment.period, names
            if carry[1] is not None:
                from lm.models.unrolled import CachedBlocks

                return CachedBlocks(*fields, name=segment.name)(carry, inputs, layers)
            return Blocks(*fields, in_scan=False, name=segment.name)(carry, inputs, layers)
        layer, fields = self._scanned(segment)
        n = len(segment.period)
        run = nn.scan(
            layer,
            variable_axes=dict.fromkeys(("params", "intermediates", MODEL_STATE, *COLLECTIONS), 0),  # type: ignore[arg-type]
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, 0),
            length=segment.n_repeats,
            unroll=max(1, (c.scan_unroll or segment.n_layers) // n),
            metadata_params={nn.PARTITION_NAME: "layers"},
            # Flax's scan check would trace the layer twice and draw another dropout key.
            check_constancy_invariants=self.is_initializing(),
        )(*fields, name=segment.name)
        carry, source = run(carry, inputs, _by_scan_step(segment, layers))
        if n > 1:
            source = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), source)
        return carry, source

    def _scanned(self, segment: Segment) -> tuple[type[nn.Module], tuple[Any, ...]]:
        """Return the module class that a scan repeats, one block or a period, and its fields."""
        c, n = self.config, len(segment.period)
        if n == 1:
            return with_remat(Block, c.remat), (c, self.deterministic, segment.period[0])
        names = tuple(f"{i}_of_{n}" for i in range(n))
        return Blocks, (c, self.deterministic, segment.period, names)


def _by_scan_step(segment: Segment, layers: LayerInputs) -> LayerInputs:
    """Reshape arrays [n_layers, …] to [scan steps, layers of a period, …]."""
    n = len(segment.period)
    if n == 1:
        return layers
    return jax.tree.map(lambda x: x.reshape(-1, n, *x.shape[1:]), layers)
