"""Shard files: tokens of consecutive documents, with a checksum per block.

A file holds the tokens, padded to whole blocks; the offset of each document among them, int64, also
padded; an index (CRC-32 of every block, first offset of every offset block); JSON; and a trailer.
Every read of a block verifies its checksum.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from lm.data.store import TokenBlock
from lm.errors import UserError

BLOCK = 2**16  # bytes per checksum
INDEX_READ = 2**17  # bytes at the end of a file that contain the index of most files
_TRAILER = struct.Struct("<QQI8s")  # index bytes, JSON bytes, their CRC-32, magic
_MAGIC = b"lmshard1"
_OPEN = 256  # cached shard indices
_KEPT = 64  # cached token blocks, and as many offset blocks


class ShardWriter:
    """Writer of a shard file."""

    def __init__(self, path: Path, dtype: np.dtype):
        self._path, self._dtype = path, dtype
        self._starts: list[np.ndarray] = []
        self.sizes = np.zeros(5, np.int64)  # in the order of `TokenBlock.sizes`

    def __enter__(self) -> Self:
        self._file = open(self._path, "wb")
        self._checksums: list[int] = []
        self._rest = b""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, block: TokenBlock) -> None:
        """Append the tokens of the next documents."""
        self._starts.append(block.starts + self.sizes[0])
        self.sizes += block.sizes
        self._write(block.tokens.tobytes())

    def finish(self, about: dict[str, Any]) -> None:
        """Write everything after the tokens; `about` is stored in the file."""
        self._pad()
        starts = np.concatenate([np.zeros(0, np.int64), *self._starts])
        self._write(starts.tobytes())
        self._pad()
        firsts = starts[:: BLOCK // 8]
        index = np.asarray(self._checksums, np.uint32).tobytes() + firsts.tobytes()
        about = {**about, "dtype": self._dtype.name, "sizes": self.sizes.tolist()}
        text = json.dumps(about).encode()
        self._file.write(index + text)
        self._file.write(_TRAILER.pack(len(index), len(text), zlib.crc32(index + text), _MAGIC))

    def _write(self, content: bytes) -> None:
        content = self._rest + content
        whole = len(content) // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            self._checksums.append(zlib.crc32(content[start : start + BLOCK]))
        self._file.write(memoryview(content)[:whole])
        self._rest = content[whole:]

    def _pad(self) -> None:
        self._write(b"\0" * (-len(self._rest) % BLOCK))


class DamagedShard(UserError):
    """Error of a damaged shard."""


@dataclass(frozen=True)
class ShardIndex:
    """Index of a shard file.

    Attributes:
        about: metadata given to `ShardWriter.finish`, with "dtype" and "sizes".
        checksums: CRC-32 of each block.
        firsts: first offset of each offset block.
        size: file size in bytes.
    """

    about: dict[str, Any]
    checksums: np.ndarray
    firsts: np.ndarray
    size: int

    @property
    def n_token_blocks(self) -> int:
        """Number of token blocks, which precede the offset blocks."""
        return len(self.checksums) - len(self.firsts)


def parse_index(end: bytes, where: str) -> ShardIndex | int:
    """Parse the index from the last bytes of a shard file; return the size needed if too short.

    Raises:
        DamagedShard: the file is damaged.
    """
    damage = DamagedShard(f"{where} is damaged: its index is not valid")
    if len(end) < _TRAILER.size:
        raise damage
    n_index, n_text, checksum, magic = _TRAILER.unpack(end[-_TRAILER.size :])
    n = n_index + n_text + _TRAILER.size
    if magic != _MAGIC or n > 2**32:
        raise damage
    if n > len(end):
        return n
    content = end[-n : -_TRAILER.size]
    if zlib.crc32(content) != checksum:
        raise damage
    about = json.loads(content[n_index:])
    n_firsts = -(-about["sizes"][1] // (BLOCK // 8))
    n_checksums = (n_index - 8 * n_firsts) // 4
    checksums = np.frombuffer(content, np.uint32, n_checksums)
    firsts = np.frombuffer(content, np.int64, n_firsts, 4 * n_checksums)
    return ShardIndex(about, checksums, firsts, n_checksums * BLOCK + n)


class ShardFiles(Protocol):
    """Access to shard files."""

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Read bytes of a file."""

    def forget(self, name: str) -> bool:
        """Remove damaged local copies of a file; return whether there may be any."""


class ShardReader:
    """Reader of a store's shards, with verified and cached blocks."""

    def __init__(self, place: str, sizes: Mapping[str, int], dtype: np.dtype, files: ShardFiles):
        """Open shards.

        Args:
            place: their folder, for messages.
            sizes: bytes of each file, in the order of the shards.
            dtype: dtype of the tokens.
            files: access to the files.
        """
        self._place, self._dtype, self._files = place, dtype, files
        self._names, self._sizes = tuple(sizes), tuple(sizes.values())
        self.index = lru_cache(_OPEN)(self._read_index)
        self._token_block = lru_cache(_KEPT)(self._read_token_block)
        self._offset_block = lru_cache(_KEPT)(self._read_offset_block)

    def where(self, shard: int) -> str:
        """Return the path of a shard file."""
        return f"{self._place}/{self._names[shard]}"

    def _read_index(self, shard: int) -> ShardIndex:
        try:
            return self._parse_index(shard)
        except DamagedShard:
            if not self._files.forget(self._names[shard]):
                raise
            return self._parse_index(shard)

    def _parse_index(self, shard: int) -> ShardIndex:
        name, size, where = self._names[shard], self._sizes[shard], self.where(shard)
        found = parse_index(self._files.read(name, max(size - INDEX_READ, 0), size), where)
        if isinstance(found, int):
            found = parse_index(self._files.read(name, max(size - found, 0), size), where)
        if isinstance(found, int) or found.size != size:
            raise DamagedShard(f"{where} is damaged: it has the wrong size")
        return found

    def block(self, shard: int, number: int) -> bytes:
        """Read and verify a block.

        Raises:
            DamagedShard: the block is damaged.
        """
        name, start = self._names[shard], number * BLOCK
        expected = self.index(shard).checksums[number]
        content = self._files.read(name, start, start + BLOCK)
        if zlib.crc32(content) != expected and self._files.forget(name):
            content = self._files.read(name, start, start + BLOCK)
        if zlib.crc32(content) != expected:
            raise DamagedShard(
                f"{self.where(shard)}: block {number} (bytes {start:,} to {start + BLOCK:,}) does "
                "not match its checksum: remove this file, so that it is rebuilt"
            )
        return content

    def _read_token_block(self, shard: int, number: int) -> np.ndarray:
        return np.frombuffer(self.block(shard, number), self._dtype)

    def _read_offset_block(self, shard: int, number: int) -> np.ndarray:
        n_before = self.index(shard).n_token_blocks
        return np.frombuffer(self.block(shard, n_before + number), np.int64)

    def tokens(self, shard: int, start: int, stop: int) -> np.ndarray:
        """Return tokens of a shard."""
        return _slice(self._token_block, shard, start, stop, BLOCK // self._dtype.itemsize)

    def offsets(self, shard: int, start: int, stop: int) -> np.ndarray:
        """Return document offsets of a shard, relative to its tokens."""
        return _slice(self._offset_block, shard, start, stop, BLOCK // 8)

    def count_offsets(self, shard: int, value: int, side: str) -> int:
        """Return how many documents of a shard start before a token, or (side "right") up to it."""
        index = self.index(shard)
        block = int(np.searchsorted(index.firsts, value, side)) - 1  # type: ignore[call-overload]
        if block < 0:
            return 0
        n = min(index.about["sizes"][1] - block * (BLOCK // 8), BLOCK // 8)
        found = self._offset_block(shard, block)[:n]
        return block * (BLOCK // 8) + int(np.searchsorted(found, value, side))  # type: ignore[call-overload]


def _slice(
    block: Callable[[int, int], np.ndarray], shard: int, start: int, stop: int, size: int
) -> np.ndarray:
    """Return elements of a shard from blocks of `size` elements."""
    parts = []
    for number in range(start // size, -(-stop // size)):
        low = max(start - number * size, 0)
        parts.append(block(shard, number)[low : stop - number * size])
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


# --- arrays over all shards


class _Sharded:
    """Array over all shards, followed by further elements; supports slicing.

    Attributes:
        dtype: dtype of the elements.
        starts: [shards + 1] int64, number of elements before each shard.
    """

    def __init__(self, lengths: Sequence[int], after: np.ndarray):
        """Join shards of these lengths, followed by `after`."""
        self.starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
        self._after, self.dtype = after, after.dtype

    def _of_shard(self, shard: int, start: int, stop: int) -> np.ndarray:
        """Return elements of a shard."""
        raise NotImplementedError

    def __len__(self) -> int:
        return int(self.starts[-1]) + len(self._after)

    @property
    def shape(self) -> tuple[int]:
        return (len(self),)

    def __getitem__(self, index: slice | int) -> Any:
        if not isinstance(index, slice):
            index = range(len(self))[index]
            return self[index : index + 1][0]
        start, stop, step = index.indices(len(self))
        end = int(self.starts[-1])
        parts = [
            self._of_shard(shard, low, high)
            for shard, low, high in _pieces(self.starts, start, min(stop, end))
        ]
        if stop > end:
            parts.append(self._after[max(start - end, 0) : stop - end])
        found = parts[0] if len(parts) == 1 else np.concatenate([self._after[:0], *parts])
        return found[::step]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def tolist(self) -> list[int]:
        """Return all elements as a list."""
        return self[:].tolist()


class ShardedTokens(_Sharded):
    """Tokens of all shards."""

    def __init__(
        self, reader: ShardReader, lengths: Sequence[int], dtype: np.dtype, last: int | None
    ):
        """Join shards of these lengths, followed by the id `last`, if any."""
        super().__init__(lengths, np.asarray([] if last is None else [last], dtype))
        self._reader = reader

    def _of_shard(self, shard: int, start: int, stop: int) -> np.ndarray:
        return self._reader.tokens(shard, start, stop)


class ShardedOffsets(_Sharded):
    """Offsets of all documents and the total token count; supports slicing and search."""

    def __init__(self, reader: ShardReader, lengths: Sequence[int], token_starts: np.ndarray):
        """Join shards with `lengths` documents whose tokens start at `token_starts`."""
        super().__init__(lengths, token_starts[-1:])
        self._reader, self._token_starts = reader, token_starts

    def _of_shard(self, shard: int, start: int, stop: int) -> np.ndarray:
        return self._reader.offsets(shard, start, stop) + self._token_starts[shard]

    def searchsorted(self, value: int, side: str = "left") -> int:
        """Return how many offsets are below a token, or (side "right") at most equal to it."""
        n_tokens = int(self._token_starts[-1])
        if value >= n_tokens:
            return int(self.starts[-1]) + (value > n_tokens or side == "right")
        shard = int(np.searchsorted(self._token_starts, value, "right")) - 1
        if shard < 0:
            return 0
        relative = value - int(self._token_starts[shard])
        return int(self.starts[shard]) + self._reader.count_offsets(shard, relative, side)


def _pieces(starts: np.ndarray, start: int, stop: int) -> list[tuple[int, int, int]]:
    """Return (shard, first, end) of the shards that hold elements from start to stop."""
    pieces = []
    shard = int(np.searchsorted(starts, start, "right")) - 1
    while start < stop:
        end = min(int(starts[shard + 1]), stop)
        if start < end:
            pieces.append((shard, start - int(starts[shard]), end - int(starts[shard])))
            start = end
        shard += 1
    return pieces
