"""Logits of a block of the vocabulary.

Inside `vocabulary_block`, the output layer of a model on a mesh computes the logits of these tokens
only. Its kernel is sliced before it is gathered from the devices that share it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

_block: ContextVar[tuple[jax.Array, int] | None] = ContextVar("vocabulary_block", default=None)


@contextlib.contextmanager
def vocabulary_block(first: jax.Array, size: int) -> Iterator[None]:
    """Trace the code inside for tokens first … first + size - 1 of the vocabulary."""
    token = _block.set((first, size))
    try:
        yield
    finally:
        _block.reset(token)


def of_block(x: jax.Array, axis: int) -> jax.Array:
    """Return the slice of a parameter for the block, if there is one.

    Args:
        x: parameter of the output layer.
        axis: its dimension of the vocabulary.
    """
    if (block := _block.get()) is None:
        return x
    return jax.lax.dynamic_slice_in_dim(x, *block, axis)
