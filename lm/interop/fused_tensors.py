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
    """Rows of a stored tensor, starting at `first` in each of its equal blocks."""

    whole: StoredTensor | None = None
    first: int = 0
    n_blocks: int = 1

    def stored_rows(self, start: int, stop: int) -> np.ndarray:
        """Read the rows start … stop - 1 in their stored type."""
        assert self.whole is not None
        own, block = (shape[0] // self.n_blocks for shape in (self.shape, self.whole.shape))
        found = []
        while start < stop:
            i, row = divmod(start, own)
            n, first = min(stop - start, own - row), i * block + self.first + row
            found.append(self.whole.stored_rows(first, first + n))
            start += n
        return found[0] if len(found) == 1 else np.concatenate(found)


def split(
    path: Path,
    fused: Fused,
    alternating: Mapping[str, int],
    n_layers: int,
    shapes: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, StoredTensor],
) -> dict[str, StoredTensor]:
    """Replace fused tensors by their parts.

    Args:
        path: folder, for messages.
        fused: the fused tensors.
        alternating: number of blocks of those in which the parts alternate.
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
            first, times = 0, alternating.get(name, 1)
            for part, n in zip(names, n_rows, strict=True):
                of_file = part, whole.file, shapes[part], whole.type
                found[part] = _RowsOfTensor(*of_file, whole=whole, first=first, n_blocks=times)
                first += n // times
    return found


def fuse(
    fused: Fused, alternating: Mapping[str, int], n_layers: int, tensors: Sequence[PendingTensor]
) -> list[PendingTensor]:
    """Fuse tensors as in the files of `transformers`; arguments as for `split`."""
    by_name = {tensor.name: tensor for tensor in tensors}
    for name, parts in fused.items():
        for i in (i for i in range(n_layers) if parts[0].format(i) in by_name):
            own = [by_name.pop(part.format(i)) for part in parts]
            shape = (sum(part.shape[0] for part in own), *own[0].shape[1:])

            def values(
                own: Sequence[PendingTensor] = own, times: int = alternating.get(name, 1)
            ) -> np.ndarray:
                parts = [part.values() for part in own]
                blocks = [part.reshape(times, -1, *part.shape[1:]) for part in parts]
                return np.concatenate(blocks, axis=1).reshape(-1, *parts[0].shape[1:])

            by_name[name.format(i)] = PendingTensor(name.format(i), shape, values)
    return list(by_name.values())
