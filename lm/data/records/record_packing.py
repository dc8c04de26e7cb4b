"""Packing: several short records share one row of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_OPEN = 64  # packs that a record may be added to; more would hardly fill rows better


@dataclass(frozen=True, eq=False)
class Packs:
    """Partition of records into packs: pack i holds indices[offsets[i]:offsets[i + 1]].

    Attributes:
        indices: [n_records] int64.
        offsets: [n_packs + 1] int64.
    """

    indices: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        return self.indices[self.offsets[index] : self.offsets[index + 1]]

    def fill(self, lengths: np.ndarray, limits: Sequence[int]) -> np.ndarray:
        """Return the fraction of each limit that the packs use on average, float64 [k]."""
        used = np.minimum(lengths, limits).sum(0)
        return used / (len(self) * np.asarray(limits))


def pack_records(lengths: np.ndarray, limits: Sequence[int], seed: int) -> Packs:
    """Pack records by first-fit in a random order, so that no sum of lengths exceeds its limit.

    A record goes to the first of the 64 open packs that has room, or opens one in place of the
    fullest. A record that alone exceeds a limit has a pack of its own.

    Args:
        lengths: [n, k], such as tokens of source and target.
        limits: [k].
        seed: seed of the order.

    Returns:
        The packs.
    """
    order = np.random.default_rng(seed).permutation(len(lengths))
    scale = 1 / np.asarray(limits)[:, None]
    room = np.full((len(limits), _OPEN), -1, np.int64)  # no pack yet: not even an empty record fits
    packs_open = np.zeros(_OPEN, np.int64)
    pack_of = np.empty(len(lengths), np.int64)  # by position in `order`
    n_packs = 0
    for place, needed in enumerate(np.asarray(lengths)[order]):
        fits = (room >= needed[:, None]).all(0)
        slot = int(fits.argmax())
        if not fits[slot]:
            slot = int((room * scale).min(0).argmin())
            room[:, slot] = limits
            packs_open[slot] = n_packs
            n_packs += 1
        room[:, slot] -= needed
        pack_of[place] = packs_open[slot]
    counts = np.bincount(pack_of, minlength=n_packs)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Packs(order[np.argsort(pack_of, kind="stable")], offsets)
