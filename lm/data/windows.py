"""Windows of a token store: fixed-length examples by random access.

Every example holds length + 1 tokens, so that shifting by one gives inputs and targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lm.data.batches import Arrays
from lm.data.store import TokenStore
from lm.errors import UserError


@dataclass(frozen=True, eq=False)
class TokenWindows:
    """Sequence of windows that start every `stride` tokens.

    An example has three int32 arrays [length + 1]: "tokens", "segment_ids" (documents of the
    window, counted from 1; 0 for padding beyond the end) and "positions" (from the start of the
    document's part in the window). "weights", float32 [length], is 1 where the next token is a
    target: of the same document, or the delimiter that ends it by starting another.

    Attributes:
        store: token store.
        length: targets of a window.
        stride: tokens from the start of one window to the next.
        isolate: documents are segments of their own; otherwise a window is a single segment.
        drop_remainder: leave out the last window if it is not full; otherwise pad it.
    """

    store: TokenStore
    length: int
    stride: int
    isolate: bool
    drop_remainder: bool

    def __len__(self) -> int:
        n_targets = len(self.store.tokens) - 1
        if self.drop_remainder:
            return max((n_targets - self.length) // self.stride + 1, 0)
        return max(-(-n_targets // self.stride), 0)

    def __getitem__(self, index: int) -> Arrays:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        size = self.length + 1
        start = index * self.stride
        found = self.store.tokens[start : start + size]
        if self.isolate:
            segment_ids, positions = self._documents(start, start + len(found))
        else:
            segment_ids, positions = (part[: len(found)] for part in self._one_segment)
        in_document = segment_ids[1:] == segment_ids[:-1]
        if self.store.manifest.delimiter is not None:
            in_document |= found[1:] == self.store.manifest.delimiter
        example = {
            "tokens": found.astype(np.int32),
            "segment_ids": segment_ids,
            "positions": positions,
            "weights": in_document.astype(np.float32),
        }
        if len(found) == size:
            return example
        padding = (0, size - len(found))
        return {name: np.pad(values, padding) for name, values in example.items()}

    @cached_property
    def _one_segment(self) -> tuple[np.ndarray, np.ndarray]:
        segment_ids = np.ones(self.length + 1, np.int32)
        positions = np.arange(self.length + 1, dtype=np.int32)
        for shared in (segment_ids, positions):
            shared.flags.writeable = False
        return segment_ids, positions

    def _documents(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Return segment ids and positions of tokens [start, end) of the store."""
        offsets = self.store.offsets
        first = offsets.searchsorted(start, side="right")
        last = offsets.searchsorted(end, side="left")
        segment_ids, positions = (part[: end - start] for part in self._one_segment)
        if first == last:
            return segment_ids, positions
        borders = offsets[first:last] - start
        starts_document = np.zeros(end - start, np.int32)
        starts_document[borders] = 1
        own_start = np.zeros(end - start, np.int32)
        own_start[borders] = borders
        return (
            segment_ids + starts_document.cumsum(dtype=np.int32),
            positions - np.maximum.accumulate(own_start),
        )


def token_windows(
    store: TokenStore, length: int, stride: int, isolate: bool, drop_remainder: bool
) -> TokenWindows:
    """Return the windows of a store: full ones for training (`drop_remainder`), all for evaluation.

    With stride = length every token but the store's first is a target exactly once.

    Args:
        store: token store.
        length: targets of a window.
        stride: tokens from the start of one window to the next.
        isolate: documents are segments of their own; otherwise a window is a single segment.
        drop_remainder: leave out the last window if it is not full; otherwise pad it.

    Raises:
        UserError: the store has too few tokens for one window.
    """
    examples = TokenWindows(store, length, stride, isolate, drop_remainder)
    if not len(examples):
        n_tokens = len(store.tokens)
        raise UserError(
            f"{store.manifest.source} has {n_tokens} tokens, too few for one window of "
            f"{length} + 1: use more text or a smaller --config.data.sequence_length"
        )
    return examples
