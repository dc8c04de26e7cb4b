"""Tensors in files: safetensors, read by rows and written tensor by tensor.

The format is eight bytes with the length of a JSON header, the header, and the arrays. It is read
here, not by its package, which maps whole files into memory: so what is in memory is one block.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np

from lm.errors import UserError

DTYPES = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
FLOATS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LARGEST_FILE = 5_000_000_000  # bytes, as the Hugging Face hub has them
_LARGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Stored:
    """One tensor in a file."""

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start … stop - 1 in float32."""
        row = prod(self.shape[1:])
        values = np.fromfile(
            self.file,
            self.dtype,
            count=(stop - start) * row,
            offset=self.offset + start * row * self.dtype.itemsize,
        )
        if len(values) < (stop - start) * row:
            raise UserError(f"{self.file} is truncated: {self.name} is not whole")
        return values.reshape(stop - start, *self.shape[1:]).astype(np.float32, copy=False)


def read_folder(folder: Path) -> dict[str, Stored]:
    """The tensors of a model folder, by name; its files are one or, with an index, several.

    UserError for what is missing, damaged or truncated.
    """
    if (folder / INDEX).is_file():
        return _read_parts(folder)
    if (folder / SINGLE).is_file():
        return read_file(folder / SINGLE)
    pickled = next((f.name for f in sorted(folder.glob("pytorch_model*.bin"))), None)
    why = f": {pickled} is a pickle, which can run code; save it as safetensors" if pickled else ""
    raise UserError(f"{folder} has no {SINGLE}{why}")


def _read_parts(folder: Path) -> dict[str, Stored]:
    try:
        parts = dict(json.loads((folder / INDEX).read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / INDEX} is damaged ({type(error).__name__}: {error})") from error
    found: dict[str, Stored] = {}
    for part in sorted(set(parts.values())):
        if Path(part).name != part or not (folder / part).is_file():
            raise UserError(f"{folder} lacks the file {part} that {INDEX} names")
        found |= read_file(folder / part)
    for name, part in parts.items():
        if name not in found:
            raise UserError(f"{folder / part} lacks the tensor {name} that {INDEX} names")
    return found


def read_file(file: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or 8 + length > size:
            what = "is truncated" if length <= _LARGEST_HEADER else "is no safetensors file"
            raise UserError(f"{file} {what}: {size:,} bytes do not hold its header")
        header = stream.read(length)
    try:
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        found = {name: _stored(name, about, file, 8 + length) for name, about in tensors.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is no safetensors file ({type(error).__name__}: {error})"
        ) from error
    for tensor in found.values():
        end = tensor.offset + prod(tensor.shape) * tensor.dtype.itemsize
        if end > size:
            raise UserError(
                f"{file} is truncated: {tensor.name} ends at byte {end:,} of {size:,}; "
                "fetch it again"
            )
    return found


def _stored(name: str, about: Mapping, file: Path, start: int) -> Stored:
    if about["dtype"] not in DTYPES:
        raise UserError(
            f"{file}: {name} has the type {about['dtype']}; known are {', '.join(DTYPES)}"
        )
    dtype, shape = DTYPES[about["dtype"]], tuple(map(int, about["shape"]))
    first, last = about["data_offsets"]
    if first < 0 or min(shape, default=0) < 0 or last - first != prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has {last - first} bytes for the shape {shape}")
    return Stored(name, file, dtype, shape, start + first)


@dataclass(frozen=True)
class Made:
    """A tensor to be written; `values()` makes it, and is called when its turn comes."""

    name: str
    shape: tuple[int, ...]
    values: Callable[[], np.ndarray]


def write_folder(
    folder: Path, tensors: Sequence[Made], dtype: str, largest: int = LARGEST_FILE
) -> None:
    """Write tensors one at a time, in files of at most `largest` bytes where one holds more than
    one tensor; `dtype` is one of `FLOATS`."""
    kind = FLOATS[dtype]
    parts: list[list[Made]] = [[]]
    room = largest
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        n_bytes = prod(tensor.shape) * DTYPES[kind].itemsize
        if n_bytes > room and parts[-1]:
            parts.append([])
            room = largest
        parts[-1].append(tensor)
        room -= n_bytes
    if len(parts) == 1:
        _write_file(folder / SINGLE, parts[0], kind)
        return
    total = sum(prod(tensor.shape) for tensor in tensors) * DTYPES[kind].itemsize
    names = [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    for name, part in zip(names, parts, strict=True):
        _write_file(folder / name, part, kind)
    where = {t.name: name for name, part in zip(names, parts, strict=True) for t in part}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_file(file: Path, tensors: Sequence[Made], kind: str) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + prod(tensor.shape) * DTYPES[kind].itemsize
        header[tensor.name] = {
            "dtype": kind,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # arrays start at a multiple of eight bytes
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            values = tensor.values()
            assert values.shape == tensor.shape, tensor.name
            np.ascontiguousarray(values, DTYPES[kind]).tofile(stream)
