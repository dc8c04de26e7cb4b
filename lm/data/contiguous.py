"""Reading a text in parallel streams, for models that carry their state from batch to batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Contiguous:
    """Examples reordered so that each row of the batches reads a stretch of its own in order.

    Row r of batch t is example r·m + t of m batches (Zaremba et al. 2014, §3). With
    `drop_remainder` the rows' stretches are full, so the last few examples are left out; without,
    the last row ends in zeros. An example's "fresh" is 1 where its row starts: there, what is
    carried starts anew.
    """

    examples: Sequence[Mapping[str, Any]]
    batch_size: int
    drop_remainder: bool

    @property
    def n_batches(self) -> int:
        n = len(self.examples)
        return max(n // self.batch_size, 1) if self.drop_remainder else -(-n // self.batch_size)

    def __len__(self) -> int:
        return self.n_batches * self.batch_size

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        batch, row = divmod(index, self.batch_size)
        place = row * self.n_batches + batch
        if place < len(self.examples):
            example = self.examples[place]
        else:
            example = {name: np.zeros_like(x) for name, x in self.examples[0].items()}
        return {**example, "fresh": np.int32(batch == 0)}
