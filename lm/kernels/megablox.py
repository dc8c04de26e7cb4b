"""Grouped matrix products on TPU, by JAX's Pallas kernels (megablox; Gale et al. 2022).

Rows are multiplied in tiles. A tile that spans several groups is computed once for each, so up to
E - 1 extra tiles are computed. The kernel's real cost is encoded in the name of its operation,
where `lm plan` reads it: the library's own estimate omits these extra tiles, and counts blocks that
stay in VMEM each time they are used.

Shape letters: T rows, D inputs, F outputs, E groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp

LANES, SUBLANES = 128, 16
ROW_TILES = (512, 256, 128)
WASTE = 1 / 8  # largest fraction of extra rows from shared tiles, unless tiles are the smallest
VMEM = 12 * 2**20  # limit for the blocks of a kernel, of the 16 MiB that compilers allow


@dataclass(frozen=True)
class Tiling:
    """Tile sizes of a product, and its cost.

    Attributes:
        rows: rows per tile.
        inputs: inputs D per tile.
        outputs: outputs F per tile.
        flops: FLOPs, including shared tiles.
        traffic: bytes read from and written to HBM.
        vmem: bytes of VMEM, including double buffering.
    """

    rows: int
    inputs: int
    outputs: int
    flops: int
    traffic: int
    vmem: int


def grouped_product(
    kind: str,
    a: jax.Array,
    b: jax.Array,
    sizes_E: jax.Array,
    n_rows: int,
    out_dtype: jnp.dtype,
    interpret: bool = False,
) -> jax.Array:
    """Multiply by groups of rows.

    Args:
        kind: "forward": [T, D] × [E, D, F] → [T, F]; "by_input": [T, F] × [E, D, F] → [T, D];
            "by_kernel": [T, D] × [T, F] → [E, D, F].
        a: rows, sorted by group.
        b: kernels, or rows.
        sizes_E: number of rows of each group; rows after the last group are not multiplied.
        n_rows: typical total number of rows in groups, by which tiles are chosen.
        out_dtype: dtype of the result; accumulation is in float32.
        interpret: run on any platform, slowly, for tests.

    Returns:
        Product; rows after the last group are undefined.
    """
    # Lazy: the import takes half a second.
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

    T, n_groups = len(a), len(sizes_E)
    D, F = (a.shape[1], b.shape[1]) if kind == "by_kernel" else (a.shape[1], b.shape[-1])
    if kind == "by_input":
        F = b.shape[1]
    itemsizes = a.dtype.itemsize, jnp.dtype(out_dtype).itemsize
    tiling = choose_tiling(kind == "by_kernel", (T, D, F), n_groups, n_rows, itemsizes)
    padding = -T % tiling.rows
    a = _pad_rows(a, padding)
    options: dict[str, Any] = {
        "preferred_element_type": out_dtype,
        "tiling": (tiling.rows, tiling.inputs, tiling.outputs),
        "interpret": interpret,
    }
    sizes_E = sizes_E.astype(jnp.int32)
    with jax.named_scope(f"cost_flops_{tiling.flops}_bytes_{tiling.traffic}"):
        if kind == "by_kernel":
            return tgmm(a.T, _pad_rows(b, padding), sizes_E, **options)
        y = gmm(a, b, sizes_E, transpose_rhs=kind == "by_input", **options)
        return y[:T]


def _pad_rows(x: jax.Array, padding: int) -> jax.Array:
    return jnp.pad(x, ((0, padding), (0, 0))) if padding else x


@lru_cache
def choose_tiling(
    by_kernel: bool,
    sizes: tuple[int, int, int],
    n_groups: int,
    n_rows: int,
    itemsizes: tuple[int, int],
) -> Tiling:
    """Choose the tiles with the least traffic that fit into VMEM.

    Args:
        by_kernel: whether the product is the gradient of the kernels.
        sizes: rows T, inputs D and outputs F of the product as computed.
        n_groups: number of groups.
        n_rows: typical total number of rows in groups.
        itemsizes: bytes per element of an operand and of the result.
    """
    T, D, F = sizes
    n_rows = max(min(n_rows, T), 1)
    fine = [rows for rows in ROW_TILES if (n_groups - 1) * rows <= WASTE * n_rows]
    rows = min(fine[0] if fine else ROW_TILES[-1], -(-T // SUBLANES) * SUBLANES)
    of_tiles = (
        _tiling(by_kernel, (D, F), n_groups, n_rows, itemsizes, (rows, d, f))
        for d, f in product(_tile_sizes(D), _tile_sizes(F))
    )
    fitting = [tiling for tiling in of_tiles if tiling.vmem <= VMEM]
    return min(fitting, key=lambda t: (t.traffic, -t.inputs * t.outputs))


def _tile_sizes(size: int) -> Iterator[int]:
    """Yield tile sizes of a dimension: all of it, or multiples of the TPU lane count."""
    yield size
    lanes = -(-size // LANES)
    yield from sorted({-(-lanes // n) * LANES for n in range(2, lanes + 1)}, reverse=True)


def _tiling(
    by_kernel: bool,
    widths: tuple[int, int],
    n_groups: int,
    n_rows: int,
    itemsizes: tuple[int, int],
    tile: tuple[int, int, int],
) -> Tiling:
    (D, F), (item, out_item), (rows, d, f) = widths, itemsizes, tile
    n_tiles = -(-n_rows // rows) + min(n_groups, n_rows) - 1
    n_d, n_f = -(-D // d), -(-F // f)
    inputs, outputs = n_tiles * rows * n_d * d, n_tiles * rows * n_f * f
    kernels = n_d * d * n_f * f
    if by_kernel:
        traffic = (inputs * n_f + outputs * n_d) * item + n_groups * kernels * out_item
        # The operands are masked in float32.
        vmem = 2 * rows * (d + f) * (item + 2) + d * f * (4 + 2 * out_item)
    else:
        # With all inputs in one tile, a kernel block stays in VMEM for all rows of its group.
        fetched = n_groups if n_d == 1 else n_tiles
        traffic = (inputs * n_f + fetched * kernels) * item + outputs * out_item
        vmem = 2 * (rows * d + d * f) * item + rows * f * (4 + 2 * out_item)
    return Tiling(*tile, 2 * n_tiles * rows * D * F, traffic, vmem)
