"""Safetensors files: read by rows, written shard by shard."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lm.errors import UserError
from lm.storage import read_json

_FLOAT_TYPES = ("F32", "F16", "BF16", "F64")
KNOWN = (*_FLOAT_TYPES, "F8_E4M3", "I64", "I32", "U8", "BOOL")
FLOATS = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LARGEST_FILE = 2_000_000_000  # bytes; a file's tensors are in memory while it is written


@dataclass(frozen=True)
class StoredTensor:
    """Tensor in a file, read on demand."""

    name: str
    file: Path
    shape: tuple[int, ...]
    type: str = "F32"

    def check_weights(self) -> None:
        """Raise UserError if the tensor does not have floats, like all weights."""
        if self.type not in _FLOAT_TYPES:
            raise UserError(
                f"{self.file}: {self.name} has the type {self.type}, but weights are floats "
                f"({', '.join(_FLOAT_TYPES)})"
            )

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Read the rows start … stop - 1 in float32; UserError unless they are finite floats."""
        self.check_weights()
        values = self.stored_rows(start, stop).astype(np.float32, copy=False)
        return self.require_finite(values)

    def stored_rows(self, start: int, stop: int) -> np.ndarray:
        """Read the rows start … stop - 1 in their stored type."""
        # Opened each time: what was read from a mapped file stays in memory until it is closed.
        with _open_file(self.file) as tensors:
            return tensors.get_slice(self.name)[start:stop]

    def require_finite(self, values: np.ndarray) -> np.ndarray:
        """Return the values; UserError if one is NaN or infinite."""
        # The sum is finite if all values are; this is faster than testing each.
        with np.errstate(invalid="ignore"):
            total = values.sum(dtype=np.float64)
        if not np.isfinite(total) and not np.isfinite(values).all():
            raise UserError(f"{self.file}: {self.name} contains NaN or infinite numbers")
        return values


@contextmanager
def _open_file(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="np") as tensors:
            yield tensors
    except SafetensorError as error:
        raise UserError(f"{file} is truncated or not a safetensors file: {error}") from error


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a model folder by name, from one file or, with an index, several.

    Raises:
        UserError: a file or tensor is missing, damaged or truncated.
    """
    # As in transformers: an index next to a single file is left over from an older save.
    if (folder / SINGLE).is_file():
        return read_tensor_file(folder / SINGLE)
    if (folder / INDEX).is_file():
        return _read_parts(folder)
    pickled = next((f.name for f in sorted(folder.glob("pytorch_model*.bin"))), None)
    why = f": {pickled} is a pickle, which can run code; save it as safetensors" if pickled else ""
    raise UserError(f"{folder} has no {SINGLE}{why}")


def _read_parts(folder: Path) -> dict[str, StoredTensor]:
    parts = read_json(folder / INDEX).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
        raise UserError(f"{folder / INDEX} has no weight_map from tensors to files")
    found: dict[str, StoredTensor] = {}
    for part in sorted(set(parts.values())):
        if Path(part).name != part or not os.path.isfile(folder / part):
            raise UserError(f"{folder} lacks the file {part[:200]} that {INDEX} names")
        tensors = read_tensor_file(folder / part)
        if twice := found.keys() & tensors.keys():
            first = found[name := min(twice)].file.name
            raise UserError(f"{folder}: the tensor {name} is in two files, {first} and {part}")
        found |= tensors
    for name, part in parts.items():
        if name not in found:
            raise UserError(f"{folder / part} lacks the tensor {name} that {INDEX} names")
    return found


def read_tensor_file(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one safetensors file by name."""
    found = {}
    with _open_file(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118  not a mapping
            about = tensors.get_slice(name)
            if about.get_dtype() not in KNOWN:
                raise UserError(
                    f"{file}: {name} has the type {about.get_dtype()}; known are {', '.join(KNOWN)}"
                )
            found[name] = StoredTensor(name, file, tuple(about.get_shape()), about.get_dtype())
    return found


@dataclass(frozen=True)
class PendingTensor:
    """Tensor to be written; `values()` computes it only when its file is written."""

    name: str
    shape: tuple[int, ...]
    values: Callable[[], np.ndarray]


def write_tensors(
    folder: Path, tensors: Sequence[PendingTensor], dtype: str, largest: int = LARGEST_FILE
) -> None:
    """Write tensors to one file or, with an index, several.

    Args:
        folder: existing folder.
        tensors: tensors in any order.
        dtype: one of `FLOATS`.
        largest: maximum bytes of a file, unless a single tensor is larger.
    """
    kind = FLOATS[dtype]
    parts: list[list[PendingTensor]] = [[]]
    room = largest
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        n_bytes = prod(tensor.shape) * kind.itemsize
        if n_bytes > room and parts[-1]:
            parts.append([])
            room = largest
        parts[-1].append(tensor)
        room -= n_bytes
    if len(parts) == 1:
        _write_file(folder / SINGLE, parts[0], kind)
        return
    total = sum(prod(tensor.shape) for tensor in tensors) * kind.itemsize
    names = [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    for name, part in zip(names, parts, strict=True):
        _write_file(folder / name, part, kind)
    where = {t.name: name for name, part in zip(names, parts, strict=True) for t in part}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_file(file: Path, tensors: Sequence[PendingTensor], kind: np.dtype) -> None:
    values = {}
    for tensor in tensors:
        x = tensor.values()
        is_integer = np.issubdtype(x.dtype, np.integer)  # packed, or a shape
        values[tensor.name] = np.asarray(x, x.dtype if is_integer else kind, order="C")
    save_file(values, file, metadata={"format": "pt"})
