"""File tensors that concatenate the rows of several tensors of the table (Phi-3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lm.errors import UserError
from lm.interop.tensor_files import PendingTensor, StoredTensor

# Names of the contained tensors by the name of the file's tensor, with "{}" for the layer.
Fused = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class _RowsOfTensor(StoredTensor):
    """Rows of a stored tensor, starting at `first`."""

    whole: StoredTensor | None = None
    first: int = 0

    def stored_rows(self, start: int, stop: int) -> np.ndarray:
        """Read the rows start … stop - 1 in their stored type."""
        assert self.whole is not None
        return self.whole.stored_rows(self.first + start, self.first + stop)


def split(
    path: Path,
    fused: Fused,
    n_layers: int,
    shapes: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, StoredTensor],
) -> dict[str, StoredTensor]:
    """Replace fused tensors by their parts.

    Args:
        path: folder, for messages.
        fused: the fused tensors.
        n_layers: number of layers.
        shapes: shapes of the tensors of the table.
        stored: tensors of the files.

    Raises:
        UserError: a fused tensor is missing or has the wrong shape.
    """
    found = dict(stored)
    for name, parts in fused.items():
        for i in (i for i in range(n_layers) if parts[0].format(i) in shapes):
            whole = found.pop(name.format(i), None)
            if whole is None:
                raise UserError(f"{path} lacks the tensor {name.format(i)}")
            names = [part.format(i) for part in parts]
            n_rows = [shapes[part][0] for part in names]
            expected = (sum(n_rows), *shapes[names[0]][1:])
            if whole.shape != expected:
                raise UserError(
                    f"{whole.file}: {whole.name} has the shape {whole.shape}, not {expected} as "
                    "config.json says"
                )
            first = 0
            for part, n in zip(names, n_rows, strict=True):
                found[part] = _RowsOfTensor(
                    part, whole.file, shapes[part], whole.type, whole=whole, first=first
                )
                first += n
    return found


def fuse(fused: Fused, n_layers: int, tensors: Sequence[PendingTensor]) -> list[PendingTensor]:
    """Fuse tensors as in the files of `transformers`."""
    by_name = {tensor.name: tensor for tensor in tensors}
    for name, parts in fused.items():
        for i in (i for i in range(n_layers) if parts[0].format(i) in by_name):
            own = [by_name.pop(part.format(i)) for part in parts]
            shape = (sum(part.shape[0] for part in own), *own[0].shape[1:])

            def values(own: Sequence[PendingTensor] = own) -> np.ndarray:
                return np.concatenate([part.values() for part in own])

            by_name[name.format(i)] = PendingTensor(name.format(i), shape, values)
    return list(by_name.values())
