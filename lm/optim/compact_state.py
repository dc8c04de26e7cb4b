"""Low-precision optimizer moments: bfloat16, or int8 with a scale per row.

Updates of a moment are smaller than the spacing of such a format, so rounding is stochastic, which
keeps the mean exact.

An int8 code holds a sign and one of 127 magnitudes on a logarithmic grid, so that the error is
proportional to the value, as with the dynamic data type of 8-bit optimizers (Dettmers et al. 2022,
§2.2).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Tree = Any

# Second moments in optax states. They are stored as square roots, which span half as many octaves,
# and are never rounded to 0, since updates are divided by them.
SECOND_MOMENTS = (".nu", ".v")
EXACT = (".left", ".right", ".left_basis", ".right_basis")  # SOAP's square matrices: not encoded
SIZES = 127
SIZES_AN_OCTAVE = 8  # the smallest magnitude is 2^-15.75 of the largest


class CompactState(NamedTuple):
    """Optimizer state with encoded moments.

    Attributes:
        updates: number of updates.
        state: optimizer state; moments are bfloat16 or int8.
        scales: tree like `state`: scale (largest magnitude) of each row, [..., 1], for int8 arrays;
            empty for others.
    """

    updates: jax.Array
    state: Tree
    scales: Tree


def compact(optimizer: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """Store the moments of an optimizer in another dtype; it still computes in float32.

    Moments are float32 arrays of the state with at least two dimensions whose path and shape match
    a parameter.

    Args:
        optimizer: the optimizer.
        dtype: "bfloat16" or "int8".
    """

    def encode(count: jax.Array, state: Tree, params: Tree) -> CompactState:
        shapes = {path: x.shape for path, x in jax.tree.leaves_with_path(params) if x.ndim > 1}
        leaves, structure = jax.tree_util.tree_flatten_with_path(state)
        key = jax.random.fold_in(jax.random.key(0), count)
        codes, scales = [], []
        for number, (path, x) in enumerate(leaves):
            code, scale = x, None
            of_params = any(shapes.get(path[start:]) == x.shape for start in range(len(path)))
            of_params &= not any(str(part) in EXACT for part in path)
            if of_params and x.dtype == jnp.float32:
                noise = jax.random.fold_in(key, number)
                if dtype == "bfloat16":
                    code = round_to_bfloat16(x, noise)
                else:
                    code, scale = to_bytes(x, noise, _is_second(path))
            codes.append(code)
            scales.append(scale)
        return CompactState(
            count, jax.tree.unflatten(structure, codes), jax.tree.unflatten(structure, scales)
        )

    def decode(path: tuple, x: jax.Array, scale: jax.Array | None) -> jax.Array:
        if scale is not None:
            return from_bytes(x, scale, _is_second(path))
        return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x

    def init(params: Tree) -> CompactState:
        return encode(jnp.zeros((), jnp.int32), optimizer.init(params), params)

    def update(grads: Tree, state: CompactState, params: Tree = None) -> tuple[Tree, CompactState]:
        decoded = jax.tree_util.tree_map_with_path(decode, state.state, state.scales)
        updates, new = optimizer.update(grads, decoded, params)
        return updates, encode(state.updates + 1, new, params)

    return optax.GradientTransformation(init, update)


def _is_second(path: tuple) -> bool:
    return any(str(part) in SECOND_MOMENTS for part in path)


def round_to_bfloat16(x: jax.Array, key: jax.Array) -> jax.Array:
    """Round float32 to bfloat16 stochastically, so that the mean is x."""
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    upper = (jax.lax.bitcast_convert_type(x, jnp.uint32) + noise) >> 16
    return jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)


def to_bytes(x: jax.Array, key: jax.Array, second: bool) -> tuple[jax.Array, jax.Array]:
    """Encode an array as int8 with stochastic rounding.

    Args:
        x: float32 [..., D].
        key: random key for rounding.
        second: whether x is a second moment, which is not negative.

    Returns:
        Codes, int8 [..., D], and row scales, float32 [..., 1].
    """
    size = jnp.sqrt(x) if second else jnp.abs(x)
    scale = size.max(-1, keepdims=True)
    size = size / jnp.where(scale > 0, scale, 1)
    lower = jnp.floor(SIZES + SIZES_AN_OCTAVE * jnp.log2(size))
    lower = jnp.clip(lower, 0, SIZES - 1)
    here, above = _sizes(lower), _sizes(lower + 1)
    code = lower + (jax.random.uniform(key, x.shape) * (above - here) < size - here)
    if second:
        code = jnp.maximum(code, size > 0)
    return (jnp.sign(x) * code).astype(jnp.int8), scale


def from_bytes(code: jax.Array, scale: jax.Array, second: bool) -> jax.Array:
    """Decode the result of `to_bytes` to float32 [..., D]."""
    code = code.astype(jnp.float32)
    x = jnp.sign(code) * _sizes(jnp.abs(code)) * scale
    return jnp.square(x) if second else x


def _sizes(code: jax.Array) -> jax.Array:
    return jnp.where(code > 0, jnp.exp2((code - SIZES) / SIZES_AN_OCTAVE), 0)
