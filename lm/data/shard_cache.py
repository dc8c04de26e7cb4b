"""Size-limited local cache of shard pieces from a bucket."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from lm.data.shards import ShardFiles
from lm.data.shared_folder import SharedFolder
from lm.storage import cache_directory

PIECE = 2**22  # bytes
_TOUCH_SECONDS = 60.0  # between updates of a piece's last use
_KEPT = 0.9  # fraction of the limit kept when it is exceeded


def shard_files(folder: SharedFolder, data: Any) -> ShardFiles:
    """Return access to the files of a folder, through a local disk cache if it is remote.

    Args:
        folder: the folder.
        data: section `data` of the configuration.
    """
    if "://" not in folder.place:
        return _DiskFiles(folder)
    name = hashlib.sha256(folder.place.encode()).hexdigest()[:32]
    root = cache_directory(data) / "pieces"
    return PieceCache(folder, root / name, root, int(data.shard_cache * 2**30))


class _DiskFiles:
    def __init__(self, folder: SharedFolder):
        self._folder = folder

    def read(self, name: str, start: int, stop: int) -> bytes:
        return self._folder.read(name, start, stop)

    def forget(self, name: str) -> bool:
        return False


class PieceCache:
    """Pieces of remote files, cached on a local disk that several processes share.

    The reader verifies what it reads (`ShardReader`) and fetches damaged local pieces again.
    """

    def __init__(self, remote: SharedFolder, folder: Path, root: Path, limit: int):
        """Open the cache.

        Args:
            remote: remote folder.
            folder: local folder of its pieces.
            root: parent of all such folders.
            limit: maximum bytes in `root`.
        """
        self._remote, self._folder, self._root, self._limit = remote, folder, root, limit
        self._touched: dict[Path, float] = {}
        self._size: int | None = None  # of all pieces; None before they are counted
        self._lock = threading.Lock()

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Read bytes of a file."""
        with self._lock:
            if self._size is None:  # the limit may have been lowered
                self._clean()
        parts = []
        for number in range(start // PIECE, -(-stop // PIECE)):
            piece = number * PIECE
            low, high = max(start - piece, 0), min(stop - piece, PIECE)
            parts.append(self._of_piece(name, number, low, high))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def forget(self, name: str) -> bool:
        """Remove the local pieces of a file."""
        shutil.rmtree(self._folder / name, ignore_errors=True)
        return True

    def _of_piece(self, name: str, number: int, low: int, high: int) -> bytes:
        path = self._folder / name / str(number)
        try:
            with open(path, "rb") as file:
                file.seek(low)
                found = file.read(high - low)
            self._touch(path)
            return found
        except OSError:
            pass  # missing, or just removed
        content = self._remote.read(name, number * PIECE, (number + 1) * PIECE)
        self._keep(path, content)
        return content[low:high]

    def _touch(self, path: Path) -> None:
        now = time.monotonic()
        if now - self._touched.get(path, -_TOUCH_SECONDS) >= _TOUCH_SECONDS:
            self._touched[path] = now
            with suppress(OSError):  # another process removed it
                os.utime(path)

    def _keep(self, path: Path, content: bytes) -> None:
        """Write a piece, and evict the least recently used ones if the limit is exceeded."""
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            temporary.replace(path)
        except OSError:  # a full or read-only disk: read from the bucket each time
            temporary.unlink(missing_ok=True)
            return
        with self._lock:
            self._size = (self._size or 0) + len(content)
            if self._size > self._limit:
                self._clean()

    def _clean(self) -> None:
        pieces = []
        for folder, _, names in os.walk(self._root):
            for name in names:
                try:
                    status = os.stat(path := os.path.join(folder, name))
                except OSError:
                    continue
                pieces.append((status.st_mtime_ns, status.st_size, path))
        self._size = sum(size for _, size, _ in pieces)
        if self._size <= self._limit:
            return
        for _, size, path in sorted(pieces):
            if self._size <= _KEPT * self._limit:
                break
            try:
                os.unlink(path)
            except OSError:
                continue
            self._touched.pop(Path(path), None)
            self._size -= size
