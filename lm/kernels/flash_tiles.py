"""Tiles of flash attention: tile shapes, and scores, bias and dropout of a pair of tiles.

Dropout: the weight of query q and key k is dropped if a 16-bit number is below rate · 2^16. That
number is a quarter of the 64 bits of Threefry-2x32 with 13 rounds (which Salmon et al. 2011 found
crush-resistant) at counter (8 ⌊q / 32⌋ + q mod 8, k), quarter ⌊q / 8⌋ mod 4, under a key per row
and head. So the bits depend neither on tiles nor on the mesh, and the backward pass regenerates
them.

Bias: a tile of T × S scores has T + S - 1 distances, stored as one row. Rotating row i by i puts
every distance in its place, and the inverse rotation sums the gradient.

Shape letters: see `flash_attention.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.kernels.dot_product_attention import NEG_INF
from lm.kernels.elementwise import softcap as apply_softcap

LANES, QUERY_GROUP = 128, 32  # TPU vector lanes; queries that share Threefry counters
LARGEST_TILE = 512
RESOLUTION = 2**16  # of the dropout rate
# Largest number of elements of a query tile, and of query gradients kept on chip, that leave room
# for scores in the 16 MiB of a TPU v4.
LARGEST_BLOCK, WHOLE_QUERIES = 2**18, 2**19
ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
N_ROUNDS = 13

Arrays = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """Static parameters of a call.

    Attributes:
        n_heads: query heads H.
        n_kv_heads: key/value heads G.
        head_dim: K.
        length: queries L on this device.
        n_keys: keys S.
        total_length: queries on all devices, of which this one holds a contiguous shard.
        causal: mask keys after the query.
        window: a causal query attends to the last `window` keys; 0: all.
        scale: factor of the scores.
        softcap: soft cap of the scores; 0: none.
        rate: dropout rate of attention weights.
        interpret: run on any platform, slowly, for tests.
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    length: int
    n_keys: int
    total_length: int
    causal: bool
    window: int
    scale: float
    softcap: float
    rate: float
    interpret: bool

    @property
    def kv_block(self) -> int:
        """Key/value heads per block: the fewest that fill the lanes, or all."""
        G, K = self.n_kv_heads, self.head_dim
        return next((m for m in range(1, G) if G % m == 0 and m * K % LANES == 0), G)

    @property
    def head_block(self) -> int:
        """Query heads per block."""
        return self.kv_block * (self.n_heads // self.n_kv_heads)

    @property
    def n_blocks(self) -> int:
        """Number of head blocks N."""
        return self.n_kv_heads // self.kv_block

    @property
    def tile(self) -> tuple[int, int]:
        """Queries T and keys C per tile."""
        largest = LARGEST_TILE
        while largest > LANES and largest * self.head_block * self.head_dim > LARGEST_BLOCK:
            largest //= 2
        short = -(-self.length // QUERY_GROUP) * QUERY_GROUP
        return short if short < largest else _tile(self.length, largest), _tile(
            self.n_keys, largest
        )

    @property
    def n_tiles(self) -> tuple[int, int]:
        """Number of query tiles and of key tiles."""
        T, C = self.tile
        return -(-self.length // T), -(-self.n_keys // C)

    @property
    def threshold(self) -> int:
        """Smallest 16-bit number that keeps a weight."""
        return round(self.rate * RESOLUTION)

    @property
    def keep_scale(self) -> float:
        """Factor applied to kept weights."""
        return RESOLUTION / (RESOLUTION - self.threshold)

    @property
    def zero_distance(self) -> int:
        """Index of distance 0 in the bias row: a multiple of the lane count."""
        before = self.total_length - self.length + self.n_tiles[0] * self.tile[0]
        return -(-before // LANES) * LANES

    def needed_pairs(self) -> float:
        """Return the mean number of tile pairs that a device computes; prefixes need more."""
        (T, C), (n, m) = self.tile, self.n_tiles
        shards = self.total_length // self.length
        starts = [shard * self.length + i * T for shard in range(shards) for i in range(n)]
        pairs = [(q, j * C) for q in starts for j in range(m)]
        needed = [self.needed(*pair, self.window) for pair in pairs] if self.causal else pairs
        return sum(map(bool, needed)) / shards

    def needed(self, query: Any, key: Any, window: Any) -> Any:
        """Return whether the tile with this first query and first key has any visible score."""
        (T, C) = self.tile
        below = key <= query + T - 1
        return below & (key + C > query - window + 1) if self.window else below


def _tile(length: int, largest: int) -> int:
    """Return the tile size that pads a length least; each tile counts as 128 extra elements."""
    sizes = range(LANES, largest + 1, LANES)
    return min(sizes, key=lambda size: (-(-length // size) * (size + LANES), -size))


class Pair:
    """Pair of a query tile and a key tile in a kernel, for one row and head block."""

    def __init__(self, layout: Layout, keys_inner: bool, numbers: Any, inputs: Arrays) -> None:
        from jax.experimental import pallas as pl

        self.layout, self.numbers, self.inputs = layout, numbers, inputs
        (T, C), outer, self.inner = layout.tile, pl.program_id(2), pl.program_id(3)
        self.i, self.j = (outer, self.inner) if keys_inner else (self.inner, outer)
        self.query, self.key = numbers[0] + self.i * T, self.j * C
        self.is_needed: Any = True
        if layout.causal:
            self.is_needed = layout.needed(self.query, self.key, numbers[1])
            if "prefix" in inputs:
                self.is_needed |= jnp.max(inputs["prefix"][0]) > 0
        self.block = pl.program_id(1) * layout.n_blocks + pl.program_id(0)

    def kv_slice(self, h: int) -> slice:
        """Return the slice of a query head's key/value head in its block."""
        K, group = self.layout.head_dim, h // (self.layout.n_heads // self.layout.n_kv_heads)
        return slice(group * K, (group + 1) * K)

    def keys(self, name: str, h: int) -> jax.Array:
        """Return keys or values [C, K], zero after the last key."""
        x_CK = self.inputs[name][0, :, self.kv_slice(h)]
        return _zero_beyond(x_CK, self.layout.n_keys, self.key, self.layout.tile[1])

    def queries(self, name: str, h: int) -> jax.Array:
        """Return scaled queries, outputs or their gradients [T, K], zero after the last query."""
        K = self.layout.head_dim
        x_TK = self.inputs[name][0, :, h * K : (h + 1) * K]
        if name == "q":
            x_TK *= jnp.asarray(self.layout.scale, x_TK.dtype)
        T = self.layout.tile[0]
        return _zero_beyond(x_TK, self.layout.length, self.i * T, T)

    def log_z(self, h: int) -> jax.Array:
        """Return the log-normalizer [T, 1], infinite after the last query."""
        T, length = self.layout.tile[0], self.layout.length
        row = self.inputs["log_z"][0, 0, h : h + 1, :]
        if length % T:
            place = self.i * T + jax.lax.broadcasted_iota(jnp.int32, row.shape, 1)
            row = jnp.where(place < length, row, jnp.inf)
        return _to_column(row)

    def mask(self) -> jax.Array | None:
        """Return the mask [T, C] shared by all heads; None if nothing is masked."""
        layout, inputs = self.layout, self.inputs
        query = self.query + jax.lax.broadcasted_iota(jnp.int32, layout.tile, 0)
        key = self.key + jax.lax.broadcasted_iota(jnp.int32, layout.tile, 1)
        mask = None
        if layout.causal:
            mask = key <= query
            if "prefix" in inputs:
                mask |= inputs["prefix"][0] > 0
            if layout.window:
                mask &= key > query - self.numbers[1]
        if "segments" in inputs:
            same = _to_column(inputs["segments"][0]) == inputs["key_segments"][0]
            mask = same if mask is None else mask & same
        if layout.n_keys % layout.tile[1]:
            exists = key < layout.n_keys
            mask = exists if mask is None else mask & exists
        return mask

    def scores(self, h: int, mask: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """Return masked scores [T, C], and the derivative of the soft cap if there is one."""
        scores, slope = dot(self.queries("q", h), self.keys("k", h), 1, 1), None
        if self.layout.softcap:
            scores = apply_softcap(scores, self.layout.softcap)
            slope = 1 - jnp.square(scores / self.layout.softcap)
        if "bias" in self.inputs:
            scores += self._bias(h)
        return scores if mask is None else jnp.where(mask, scores, NEG_INF), slope

    def _distances(self) -> tuple[Any, int, int]:
        """Return the slice of the bias row with the tile's distances, and its parts' widths.

        The slice starts at the distance of the first key to the query `before` positions after the
        first.
        """
        from jax.experimental import pallas as pl

        T, C = self.layout.tile
        before = -(-T // LANES) * LANES
        start = self.key - self.query - before + self.layout.zero_distance
        return pl.ds(pl.multiple_of(start, LANES), before + C), before, C

    def _bias(self, h: int) -> jax.Array:
        """Return the bias [T, C]: row i is the distance row rotated by i."""
        from jax.experimental.pallas import tpu as pltpu

        where, before, C = self._distances()
        row = self.inputs["bias"][0, h : h + 1, where]
        rows = jnp.broadcast_to(row, (8, before + C))
        place = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0)
        for bit in (1, 2, 4):
            rows = jnp.where(place & bit > 0, pltpu.roll(rows, bit, 1), rows)
        parts = [pltpu.roll(rows, C + i, 1) for i in range(0, self.layout.tile[0], 8)]
        return jnp.concatenate(parts)[:, :C]

    def add_bias_gradient(self, dbias: Any, h: int, dscores: jax.Array) -> None:
        """Add the gradient of the tile's scores, summed by distance."""
        from jax.experimental.pallas import tpu as pltpu

        where, before, C = self._distances()
        rows = jnp.concatenate([jnp.zeros((len(dscores), before), jnp.float32), dscores], axis=1)
        # Repeatedly rotate the later half of the rows onto the earlier half.
        while len(rows) % 2 == 0:
            half, width = len(rows) // 2, before + C
            rows = rows[:half] + pltpu.roll(rows[half:], width - half, 1)
        for i in range(len(rows)):
            row = rows[i : i + 1]
            dbias[0, h : h + 1, where] += pltpu.roll(row, before + C - i, 1) if i else row

    def keep(self, h: int) -> jax.Array:
        """Return the dropout mask [T, C] of a head; true keeps a weight."""
        layout, (T, C) = self.layout, self.layout.tile
        first = 2 + 2 * (self.block * layout.head_block + h)
        key = [self.numbers[first + w].astype(jnp.uint32) for w in range(2)]
        return keep_weights(key, self.query, self.key, T, C, layout.threshold)


def keep_weights(
    key: list[jax.Array], query: Any, first_key: Any, T: int, C: int, threshold: int
) -> jax.Array:
    """Return the dropout mask of a tile; true keeps a weight.

    Args:
        key: two uint32 words for the row and head.
        query: index of the first query, a multiple of 32.
        first_key: index of the first key.
        T: number of queries, a multiple of 32.
        C: number of keys.
        threshold: 16-bit numbers below it are dropped.

    Returns:
        Boolean mask [T, C].
    """
    shape = (T // 4, C)
    counters = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + jax.lax.div(query, 4)
    keys = jax.lax.broadcasted_iota(jnp.int32, shape, 1) + first_key
    words = threefry(key, [counters.astype(jnp.uint32), keys.astype(jnp.uint32)])
    quarters = [part for word in words for part in (word & 0xFFFF, word >> 16)]
    grouped = [part.astype(jnp.int32).reshape(T // QUERY_GROUP, 1, 8, C) for part in quarters]
    return jnp.concatenate(grouped, axis=1).reshape(T, C) >= threshold


def threefry(key: list[Any], counter: list[Any]) -> list[Any]:
    """Return the two words of Threefry-2x32 with 13 rounds, for uint32 of any shape.

    Salmon et al. 2011, §2.2; `jax.random` uses 20 rounds.
    """
    keys = [*key, key[0] ^ key[1] ^ np.uint32(0x1BD11BDA)]
    x, y = (word + k for word, k in zip(counter, key, strict=True))
    for i in range(N_ROUNDS):
        r = ROTATIONS[i % 8]
        x = x + y
        y = ((y << np.uint32(r)) | (y >> np.uint32(32 - r))) ^ x
        if i % 4 == 3:
            n = i // 4 + 1
            x, y = x + keys[n % 3], y + keys[(n + 1) % 3] + np.uint32(n)
    return [x, y]


def dot(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    """Return the float32 product of two matrices, contracted over these axes."""
    dimensions = (((x_axis,), (y_axis,)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def _zero_beyond(x: jax.Array, length: int, first: Any, tile: int) -> jax.Array:
    """Zero the undefined elements of a tile after the end of a dimension."""
    if length % tile == 0:
        return x
    return jnp.where(first + jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) < length, x, 0)


def to_row(column: jax.Array) -> jax.Array:
    """Transpose [T, 1] to [1, T]."""
    return jnp.broadcast_to(column, (len(column), LANES)).T[:1]


def _to_column(row: jax.Array) -> jax.Array:
    """Transpose [1, T] to [T, 1]."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]
