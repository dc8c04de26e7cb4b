"""Ring attention: attention over a sequence that is sharded over a mesh axis.

Every device keeps its queries and, in C steps, attends to the keys of all C devices; each device
sends the keys it holds to the next one while using them (Liu et al. 2023). A kernel (`Tiles`)
computes a step; partial results are combined by their log-normalizers, and the gradients of a step
only need the log-normalizer over all keys (Dao et al. 2022, alg. 4).

Causal attention runs in zig-zag order, which balances the work. The sequence is split into 2 C
chunks for C devices. In sequence order device d has chunks 2 d and 2 d + 1, so the last device
attends to almost all keys and the first to almost none; in zig-zag order it has chunks d and
2 C - 1 - d (Llama 3, §3.3.2), and computes two of four chunk pairs in every step: for keys from a
device earlier in the ring, the early chunk for all queries; for keys from a later one, all keys for
the late chunk of queries.

Attention with a window needs no ring: a device fetches the keys before its own that the window of
its first query reaches (`keys_before`), and its queries stay in sequence order.

All functions except `zigzag_order` run inside `jax.shard_map`, on a device's shard.

Shape letters: B batch, L queries, S keys, H heads, G key/value heads, K head dim.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lm.kernels.dot_product_attention import beside_sinks

SAVED = "ring_attention"  # checkpoint name by which remat policies keep the output
NOWHERE = -1  # segment id of keys that no query attends to

Segments = tuple[jax.Array, jax.Array] | None  # of queries [B, L] and keys [B, S]
Partial = tuple[jax.Array, jax.Array]  # output over some of the keys [B, H, L, K], log Z [B, H, L]
Grads = tuple[jax.Array, jax.Array, jax.Array]  # of queries, keys and values


class Tiles(Protocol):
    """Hashable attention kernel over queries and keys, either causal or with all pairs visible."""

    def forward(
        self, q_BHLK: jax.Array, k_BGSK: jax.Array, v_BGSK: jax.Array, ids: Segments, causal: bool
    ) -> Partial:
        """Compute attention of queries to keys.

        Args:
            q_BHLK: scaled queries.
            k_BGSK: keys.
            v_BGSK: values.
            ids: segment ids of queries and keys, which attention stays within.
            causal: mask keys after the query; otherwise all pairs are visible.

        Returns:
            Output, and log Z, which is very small for a query without keys.
        """

    def backward(
        self,
        q_BHLK: jax.Array,
        k_BGSK: jax.Array,
        v_BGSK: jax.Array,
        ids: Segments,
        causal: bool,
        log_z_BHL: jax.Array,
        delta_BHL: jax.Array,
        out_BHLK: jax.Array,
        g_BHLK: jax.Array,
    ) -> Grads:
        """Return the gradients of queries, keys and values.

        Args:
            q_BHLK: scaled queries.
            k_BGSK: keys.
            v_BGSK: values.
            ids: segment ids of queries and keys, which attention stays within.
            causal: mask keys after the query; otherwise all pairs are visible.
            log_z_BHL: log-normalizer of each query over all keys.
            delta_BHL: Σ gradient · output of each query.
            out_BHLK: output over all keys.
            g_BHLK: gradient of the output.

        Returns:
            Contributions of these keys to the gradients.
        """


class RingKeys(NamedTuple):
    """Keys and values with segment ids, and separate segment ids for earlier queries.

    Attributes:
        k_BGSK: keys.
        v_BGSK: values.
        ids_BS: segment ids, or None.
        prefix_ids_BS: segment ids, `NOWHERE` outside of prefixes; None without prefixes.
    """

    k_BGSK: jax.Array
    v_BGSK: jax.Array
    ids_BS: jax.Array | None
    prefix_ids_BS: jax.Array | None


def ring_attention(
    q_BLHK: jax.Array,
    k_BLGK: jax.Array,
    v_BLGK: jax.Array,
    segments_BL: jax.Array | None,
    prefix_BL: jax.Array | None = None,
    sinks_H: jax.Array | None = None,
    *,
    causal: bool,
    axis: str,
    tiles: Tiles,
) -> jax.Array:
    """Compute attention over the full sequence from a device's shard.

    Args:
        q_BLHK: this device's scaled queries; L is even if `causal`.
        k_BLGK: this device's keys.
        v_BLGK: this device's values.
        segments_BL: segment ids that attention stays within, or None.
        prefix_BL: true for keys that earlier causal queries attend to as well, or None.
        sinks_H: attention-sink logits, or None.
        causal: mask keys after the query.
        axis: mesh axis that shards the sequence.
        tiles: kernel that computes a step.

    Returns:
        This device's shard of the output, [B, L, H, K].
    """
    prefix_ids_BL = None
    if causal and prefix_BL is not None:
        if segments_BL is None:
            segments_BL = jnp.zeros(prefix_BL.shape, jnp.int32)
        prefix_ids_BL = jnp.where(prefix_BL.astype(bool), segments_BL, NOWHERE)
    zigzag = causal and prefix_ids_BL is None
    arrays: Any = (q_BLHK, k_BLGK, v_BLGK, segments_BL)
    if zigzag:
        arrays = jax.tree.map(partial(to_zigzag, axis=axis), arrays)
    q_BHLK, k_BGLK, v_BGLK = (x.swapaxes(1, 2) for x in arrays[:3])
    keys = RingKeys(k_BGLK, v_BGLK, arrays[3], prefix_ids_BL)
    out_BHLK, log_z_BHL = _ring(q_BHLK, keys, causal, axis, tiles)
    if sinks_H is not None:
        out_BHLK *= beside_sinks(log_z_BHL[..., None], sinks_H[:, None, None]).astype(q_BLHK.dtype)
    out_BLHK = out_BHLK.swapaxes(1, 2)
    return from_zigzag(out_BLHK, axis) if zigzag else out_BLHK


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _ring(q_BHLK: jax.Array, keys: RingKeys, causal: bool, axis: str, tiles: Tiles) -> Partial:
    return _forward(q_BHLK, keys, causal, axis, tiles)[0]


def _forward(
    q_BHLK: jax.Array, keys: RingKeys, causal: bool, axis: str, tiles: Tiles
) -> tuple[Partial, tuple]:
    ids_BL, arriving = keys.ids_BS, _send_to_next(keys, axis)
    parts = [
        tiles.forward(q_BHLK, own.k_BGSK, own.v_BGSK, _pair(ids_BL, own.ids_BS), is_cut)
        for own, is_cut in _own_keys(keys, causal)
    ]
    total = parts[0][0].astype(jnp.float32), parts[0][1]
    for part in parts[1:]:
        total = add_partial(total, part)

    def attend(total: Partial, here: RingKeys, number: Any) -> Partial:
        def pair(rows: slice, columns: slice) -> Partial:
            q, k, v, ids = _cut(q_BHLK, here, ids_BL, rows, columns)
            added = add_partial(
                (total[0][:, :, rows], total[1][:, :, rows]), tiles.forward(q, k, v, ids, False)
            )
            out_BHLK, log_z_BHL = (
                lax.dynamic_update_slice_in_dim(whole, new, rows.start, axis=2)
                for whole, new in zip(total, added, strict=True)
            )
            return out_BHLK, log_z_BHL

        return _on_visible(pair, here, causal, number, axis)

    def step(
        carry: tuple[Partial, RingKeys], number: jax.Array
    ) -> tuple[tuple[Partial, RingKeys], None]:
        total, here = carry
        arriving = _send_to_next(here, axis)
        return (attend(total, _seen(here, number, axis), number), arriving), None

    last = lax.axis_size(axis) - 1
    (total, here), _ = lax.scan(step, (total, arriving), jnp.arange(1, last))
    out_BHLK, log_z_BHL = attend(total, _seen(here, last, axis), last)
    out_BHLK = checkpoint_name(out_BHLK.astype(q_BHLK.dtype), SAVED)
    log_z_BHL = checkpoint_name(log_z_BHL, SAVED)
    return (out_BHLK, log_z_BHL), (q_BHLK, keys, out_BHLK, log_z_BHL)


def _backward(
    causal: bool, axis: str, tiles: Tiles, residuals: tuple, gradients: Partial
) -> tuple[jax.Array, RingKeys]:
    q_BHLK, keys, out_BHLK, log_z_BHL = residuals
    g_BHLK, of_log_z_BHL = gradients
    ids_BL, arriving = keys.ids_BS, _send_to_next(keys, axis)
    # A score's gradient is its weight times (gradient · (value - output) + gradient of log Z).
    delta_BHL = jnp.sum(g_BHLK * out_BHLK, axis=-1, dtype=jnp.float32) - of_log_z_BHL
    whole = slice(0, q_BHLK.shape[2])

    def of_pair(here: RingKeys, is_cut: bool, rows: slice, columns: slice) -> Grads:
        q, k, v, ids = _cut(q_BHLK, here, ids_BL, rows, columns)
        of_rows = (x[:, :, rows] for x in (log_z_BHL, delta_BHL, out_BHLK, g_BHLK))
        return tiles.backward(q, k, v, ids, is_cut, *of_rows)

    grads: Any = [of_pair(own, is_cut, whole, whole) for own, is_cut in _own_keys(keys, causal)]
    dq, *dkeys = (sum(x.astype(jnp.float32) for x in parts) for parts in zip(*grads, strict=True))

    def attend(dq: jax.Array, here: RingKeys, number: Any) -> Grads:
        def pair(rows: slice, columns: slice) -> Grads:
            dq_part, *of_keys = of_pair(here, False, rows, columns)
            empty = here.k_BGSK.shape[2] - columns.stop
            dk, dv = (jnp.pad(x, ((0, 0), (0, 0), (0, empty), (0, 0))) for x in of_keys)
            return dq.at[:, :, rows].add(dq_part), dk, dv

        return _on_visible(pair, here, causal, number, axis)

    def step(carry: Any, number: jax.Array) -> tuple[Any, None]:
        dq, dkeys, here = carry
        arriving = _send_to_next(here, axis)
        # The gradients of keys travel with the keys.
        dkeys = _send_to_next(dkeys, axis)
        dq, *added = attend(dq, _seen(here, number, axis), number)
        return (dq, jax.tree.map(jnp.add, dkeys, added), arriving), None

    last = lax.axis_size(axis) - 1
    (dq, dkeys, here), _ = lax.scan(step, (dq, dkeys, arriving), jnp.arange(1, last))
    dkeys = _send_to_next(dkeys, axis)
    dq, *added = attend(dq, _seen(here, last, axis), last)
    # The last step ends at the device before the owner of the keys.
    dk, dv = _send_to_next(jax.tree.map(jnp.add, dkeys, added), axis)
    dtype = g_BHLK.dtype
    return dq.astype(dtype), RingKeys(dk.astype(dtype), dv.astype(dtype), None, None)


_ring.defvjp(_forward, _backward)


def _own_keys(keys: RingKeys, causal: bool) -> list[tuple[RingKeys, bool]]:
    """Return a device's own keys, and whether the causal mask applies to them.

    Prefix keys, to which it does not apply, are returned separately.
    """
    if keys.ids_BS is None or keys.prefix_ids_BS is None:
        return [(keys, causal)]
    others_BS = jnp.where(keys.prefix_ids_BS == NOWHERE, keys.ids_BS, NOWHERE)
    return [
        (keys._replace(ids_BS=others_BS), True),
        (keys._replace(ids_BS=keys.prefix_ids_BS), False),
    ]


def _seen(here: RingKeys, step: Any, axis: str) -> RingKeys:
    """Return the keys received in a step; if they are later ones, only prefix keys are visible."""
    if here.ids_BS is None or here.prefix_ids_BS is None:
        return here
    from_earlier = step <= lax.axis_index(axis)
    return here._replace(ids_BS=jnp.where(from_earlier, here.ids_BS, here.prefix_ids_BS))


def _on_visible(compute: Any, here: RingKeys, causal: bool, step: Any, axis: str) -> Any:
    """Call `compute` with the slices of queries and keys that see each other."""
    n = here.k_BGSK.shape[2]
    if not causal or here.prefix_ids_BS is not None:
        return compute(slice(0, n), slice(0, n))
    return lax.cond(
        step <= lax.axis_index(axis),
        lambda: compute(slice(0, n), slice(0, n // 2)),
        lambda: compute(slice(n // 2, n), slice(0, n)),
    )


def _cut(
    q_BHLK: jax.Array, here: RingKeys, ids_BL: jax.Array | None, rows: slice, columns: slice
) -> tuple[jax.Array, jax.Array, jax.Array, Segments]:
    k, v = (x[:, :, columns] for x in here[:2])
    if ids_BL is None or here.ids_BS is None:
        return q_BHLK[:, :, rows], k, v, None
    return q_BHLK[:, :, rows], k, v, (ids_BL[:, rows], here.ids_BS[:, columns])


def _pair(ids_BL: jax.Array | None, ids_BS: jax.Array | None) -> Segments:
    return None if ids_BL is None or ids_BS is None else (ids_BL, ids_BS)


def add_partial(one: Partial, other: Partial) -> Partial:
    """Combine attention over two disjoint sets of keys, float32."""
    log_z_BHL = jnp.logaddexp(one[1], other[1])
    scaled = (out * jnp.exp(log_z - log_z_BHL)[..., None] for out, log_z in (one, other))
    return sum(scaled), log_z_BHL  # type: ignore[return-value]


def _send_to_next(tree: Any, axis: str) -> Any:
    """Send arrays to the next device of the ring; return those of the previous device."""
    n = lax.axis_size(axis)
    return lax.ppermute(tree, axis, [(d, (d + 1) % n) for d in range(n)])


# --- windows


def keys_before(
    k_BLGK: jax.Array, v_BLGK: jax.Array, segments_BL: jax.Array | None, n: int, axis: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return a device's keys, preceded by the `n` keys before them.

    Args:
        k_BLGK: this device's keys.
        v_BLGK: this device's values.
        segments_BL: their segments, or None.
        n: number of keys, at most those of all other devices.
        axis: mesh axis that shards the sequence.

    Returns:
        Keys and values [B, n + L, G, K] and segment ids [B, n + L], `NOWHERE` before the sequence.
    """
    if segments_BL is None:
        segments_BL = jnp.zeros(k_BLGK.shape[:2], jnp.int32)
    here = k_BLGK, v_BLGK, segments_BL
    parts = [here]
    for hop in range(1, -(-n // k_BLGK.shape[1]) + 1):
        wanted = min(n - (hop - 1) * k_BLGK.shape[1], k_BLGK.shape[1])
        k, v, ids = _send_to_next(jax.tree.map(lambda x, w=wanted: x[:, -w:], here), axis)
        ids = jnp.where(hop <= lax.axis_index(axis), ids, NOWHERE)
        here = k, v, ids
        parts.insert(0, here)
    return jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1), *parts)


# --- squares of causal attention


def halves(tree: Any) -> Any:
    """Split a causal attention square into the two squares on its diagonal.

    Args:
        tree: arrays [B, H, L, …] and segment ids [B, L].

    Returns:
        Arrays with two rows of half the length for each row.
    """

    def cut(x: jax.Array) -> jax.Array:
        axis = min(x.ndim - 1, 2)
        parts = x.reshape(*x.shape[:axis], 2, -1, *x.shape[axis + 1 :])
        rows = jnp.moveaxis(parts, axis, 1)
        return rows.reshape(2 * len(x), *rows.shape[2:])

    return jax.tree.map(cut, tree)


def join_halves(tree: Any) -> Any:
    """Invert `halves` for arrays [B, H, L, …]."""

    def join(x: jax.Array) -> jax.Array:
        parts = jnp.moveaxis(x.reshape(-1, 2, *x.shape[1:]), 1, 2)
        return parts.reshape(*parts.shape[:2], -1, *x.shape[3:])

    return jax.tree.map(join, tree)


# --- zig-zag order


def _zigzag_owner(part: int, n_devices: int) -> int:
    """Return the device that holds a chunk in zig-zag order."""
    return min(part, 2 * n_devices - 1 - part)


def zigzag_order(length: int, n_devices: int) -> np.ndarray:
    """Return the sequence positions [L] of the tokens in zig-zag order."""
    parts = [(d, 2 * n_devices - 1 - d) for d in range(n_devices)]
    return np.arange(length).reshape(2 * n_devices, -1)[np.ravel(parts)].ravel()


def to_zigzag(x: jax.Array, axis: str) -> jax.Array:
    """Exchange a device's shard [B, L, …] in sequence order for its shard in zig-zag order."""
    first, second = jnp.split(x, 2, axis=1)
    first, second = _send(first, axis, 0), _send(second, axis, 1)
    return jnp.concatenate(_order_halves(first, second, axis), axis=1)


def from_zigzag(x: jax.Array, axis: str) -> jax.Array:
    """Invert `to_zigzag`."""
    early, late = jnp.split(x, 2, axis=1)
    first, second = _order_halves(early, late, axis)
    parts = _send(first, axis, 0, back=True), _send(second, axis, 1, back=True)
    return jnp.concatenate(parts, axis=1)


def _send(half: jax.Array, axis: str, which: int, back: bool = False) -> jax.Array:
    """Send first (0) or second (1) halves to their devices in zig-zag order, or `back`."""
    n = lax.axis_size(axis)
    route = [(d, _zigzag_owner(2 * d + which, n)) for d in range(n)]
    return lax.ppermute(half, axis, [pair[::-1] for pair in route] if back else route)


def _order_halves(one: jax.Array, other: jax.Array, axis: str) -> tuple[jax.Array, jax.Array]:
    """Order the halves by position: the first one leads on even devices, the second on odd ones."""
    even = lax.axis_index(axis) % 2 == 0
    return jnp.where(even, one, other), jnp.where(even, other, one)
