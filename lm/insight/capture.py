"""Capture of intermediate activations of a Transformer.

The model is not modified: its methods are intercepted (`nn.intercept_methods`) and sow activations.
Without a mesh, as here, layers are a scan whose "intermediates" are stacked, so every layer is
captured whether scanned, unrolled or rematerialized.

Shape letters: B batch, L query length, S key length, H heads, G key/value heads, K head dim,
D model, W width of the residual stream (D unless `residual="concat"`), F feed-forward, N layers,
U sublayers of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.errors import UserError
from lm.experiment import Experiment
from lm.kernels.dot_product_attention import AttentionMask, attention
from lm.models.attention import DotProductAttention
from lm.models.cross_attention import CrossAttention
from lm.models.layers import FeedForward, Linear
from lm.models.parameter_groups import layer_numbers, stack_of
from lm.models.transformer import Block, Stack
from lm.models.transformer_config import TransformerConfig
from lm.models.variables import Params, flat

Captured = dict[str, Any]
_INTERMEDIATES = "intermediates"  # collection that `Stack` stacks over layers

# Capturable activations and their shapes.
CAPTURES = {
    "attention": "weights of self-attention [N, B, H, L, L]",
    "cross_attention": "weights of attention to the encoder's output [N, B, H, L, S]",
    "residual": "residual stream: input of the first layer and output of each [N+1, B, L, D]",
    "updates": "output that each sublayer adds to the residual stream [N, U, B, L, D]",
    "neurons": "activations inside the feed-forward layers [N, B, L, F]",
}


def require_transformer(model: nn.Module) -> None:
    """Raise UserError unless the model is a Transformer."""
    config: Any = model.config  # type: ignore[attr-defined]
    if not isinstance(config, TransformerConfig):
        raise UserError(
            f"{type(model).__name__} has no Transformer layers to inspect: use a decoder, an "
            "encoder or an encoder–decoder"
        )


def has_all_params(experiment: Experiment, params: Params) -> bool:
    """Return whether the parameters include all heads, which an import may lack."""
    return flat(params).keys() >= experiment.param_infos.keys()


def run_and_capture(
    model: nn.Module,
    variables: Mapping[str, Any],
    capture: Collection[str],
    run: Callable[[Any], Any],
) -> tuple[Any, Captured]:
    """Run a model and capture intermediate activations; can be traced.

    Args:
        model: a Transformer, without a mesh.
        variables: its variables.
        capture: names from `CAPTURES`.
        run: called with the bound model, which it calls.

    Returns:
        Result of `run`, and captured float32 arrays by name; for an encoder–decoder "encoder/NAME"
        and "decoder/NAME". Arrays whose shapes differ between layers form a tuple; arrays that a
        model does not have are omitted.

    Raises:
        UserError: a name is unknown, or the model is not a Transformer.
    """
    require_transformer(model)
    config: Any = model.config  # type: ignore[attr-defined]
    model = model.clone(config=replace(config, remat="none"))
    for name in capture:
        if name not in CAPTURES:
            raise UserError(f"cannot capture {name!r} (known: {', '.join(CAPTURES)})")
    with nn.intercept_methods(_sow_for(frozenset(capture))):
        bound: Any = nn.apply(run, model, mutable=[_INTERMEDIATES])
        result, state = bound(variables)
    return result, _by_layer(flat(state.get(_INTERMEDIATES, {})))


def _sow_for(capture: Collection[str]) -> Callable[..., Any]:
    """Return an interceptor that sows the requested activations."""

    def intercept(method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, name = context.module, context.method_name
        kind, owner = type(module), module.parent

        def sow(what: str, value: jax.Array) -> None:
            module.sow(_INTERMEDIATES, what, value.astype(jnp.float32))

        if name == "_attend" and isinstance(module, DotProductAttention):
            what = "cross_attention" if isinstance(module, CrossAttention) else "attention"
            if what in capture:
                sow(what, attention_weights(module.config, *args, **kwargs))
        if name != "__call__":
            return method(*args, **kwargs)
        if "residual" in capture and kind is Stack:
            sow("embedded", args[0])
        # A block's dropout modules are those of its sublayers' outputs, in order.
        if "updates" in capture and kind is nn.Dropout and isinstance(owner, Block):
            sow("updates", args[0])
        is_last = kind is Linear and module.name == "out" and isinstance(owner, FeedForward)
        if "neurons" in capture and is_last:
            sow("neurons", args[0])
        result = method(*args, **kwargs)
        if "residual" in capture and kind is Block:  # not a scanned one, which is a subclass
            (x_BLW, _), _ = result
            sow("residual", x_BLW)
        return result

    return intercept


def _by_layer(sown: Mapping[str, tuple[jax.Array, ...]]) -> Captured:
    """Return sown values by stack and name, in layer order."""
    embedded: dict[str, jax.Array] = {}
    found: dict[str, dict[str, dict[tuple[int, int], jax.Array]]] = {}
    for path, (value,) in sown.items():
        owner, _, what = path.rpartition("/")
        stack = stack_of(path).rstrip("/")
        if what == "embedded":
            embedded[owner] = value
            continue
        numbers = layer_numbers(path, value)
        assert numbers is not None
        part = owner.rpartition("/")[2] if what == "updates" else ""  # Dropout_0, Dropout_1, …
        layers = value if numbers.ndim else value[None]
        of_name = found.setdefault(stack, {}).setdefault(what, {})
        for number, layer in zip(numbers.reshape(-1).tolist(), layers, strict=True):
            of_name[number, int(part.rpartition("_")[2] or 0)] = layer
    captured: Captured = {}
    for stack, by_name in found.items():
        for what, by_place in by_name.items():
            values = [by_place[place] for place in sorted(by_place)]
            if what == "residual":
                values = [embedded[stack], *values]
            key = what if stack == "stack" else f"{stack}/{what}"
            captured[key] = _stacked(values)
            if what == "updates":
                n_layers = len({number for number, _ in by_place})
                x = captured[key]
                captured[key] = x.reshape(n_layers, -1, *x.shape[1:])
    return captured


def _stacked(values: list[jax.Array]) -> Any:
    """Stack arrays of equal shape; return others as a tuple."""
    same = all(value.shape == values[0].shape for value in values)
    return jnp.stack(values) if same else tuple(values)


def attention_weights(
    config: TransformerConfig,
    q_BLHK: jax.Array,
    keys_values: tuple[jax.Array, jax.Array],
    mask: AttentionMask,
    bias_HLS: jax.Array | None = None,
    sinks_H: jax.Array | None = None,
) -> jax.Array:
    """Return attention weights [B, H, L, S], by attending to one-hot values.

    Fused kernels never materialize them; here they are computed by the plain kernel in float32.

    Args:
        config: configuration of the stack.
        q_BLHK: queries, after RoPE if used.
        keys_values: keys and values [B, S, G, K].
        mask: attention mask.
        bias_HLS: position bias of the scores.
        sinks_H: attention-sink logits.
    """
    k_BSGK, _ = keys_values
    B, S, G, K = k_BSGK.shape
    identity_SS = jnp.eye(S, -(-S // K) * K)  # values have width K, so K keys at a time
    parts_BLHK = [
        attention(
            q_BLHK.astype(jnp.float32),
            k_BSGK.astype(jnp.float32),
            jnp.broadcast_to(one_hot_SK[:, None], (B, S, G, K)),
            mask,
            scale=config.score_scale,
            softcap=config.attention_softcap,
            bias_HLS=bias_HLS,
            sinks_H=sinks_H,
        )
        for one_hot_SK in jnp.split(identity_SS, identity_SS.shape[1] // K, axis=1)
    ]
    return jnp.concatenate(parts_BLHK, axis=-1)[..., :S].swapaxes(1, 2)
