"""Batch order for models with carried state: each row reads a contiguous part of the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from lm.data.batches import Examples, ExampleSource


def contiguous_rows(parts: Sequence[Examples], batch_size: int, endless: bool) -> grain.MapDataset:
    """Order examples so that row r of a batch continues row r of the previous batch.

    Args:
        parts: examples; there must be exactly one source.
        batch_size: rows per batch.
        endless: repeat, and drop the last examples so that all rows have equal length.
    """
    (part,) = parts
    sequence: Any = part
    reordered: Any = ContiguousRows(sequence, batch_size, drop_remainder=endless)
    examples = ExampleSource(reordered)
    return examples.repeat() if endless else examples


@dataclass(frozen=True, eq=False)
class ContiguousRows:
    """Examples reordered so that each row of the batches reads a contiguous part in order.

    Row r of batch t is example r·m + t, for m batches (Zaremba et al. 2014, §3). "fresh" is 1 at
    the start of a row, where the carried state is reset.

    Attributes:
        examples: examples in their original order.
        batch_size: rows per batch.
        drop_remainder: drop the last examples so that all rows are full; otherwise the last row is
            padded with zeros.
    """

    examples: Sequence[Mapping[str, Any]]
    batch_size: int
    drop_remainder: bool

    @property
    def n_batches(self) -> int:
        """Number of batches per pass."""
        n = len(self.examples)
        return max(n // self.batch_size, 1) if self.drop_remainder else -(-n // self.batch_size)

    def __len__(self) -> int:
        return self.n_batches * self.batch_size

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        batch, row = divmod(index, self.batch_size)
        index = row * self.n_batches + batch
        if index < len(self.examples):
            example = self.examples[index]
        else:
            example = {name: np.zeros_like(x) for name, x in self.examples[0].items()}
        return {**example, "fresh": np.int32(batch == 0)}
