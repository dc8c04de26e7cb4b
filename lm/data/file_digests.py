"""Digests of the user's files, remembered from start to start; noticing that a file changes.

The cache has a file `digests.jsonl`: a line a file, of its path, its state (times, size, identity)
and the sha256 of its content, which is trusted as long as the state stays. Processes append whole
lines; a line that a killed process cut is left out.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lm.data.compression import file_name
from lm.errors import UserError

State = tuple[int, ...]

_NAME = "digests.jsonl"
# A file may change twice within the resolution of its times: one as new as this is hashed again.
_RACY_NS = 2 * 10**9
_SPARE_LINES = 1000  # that are out of date, before the file is written anew

# State of the files when they were hashed, to notice that one changes while it is read.
_hashed: dict[Path, State] = {}
_cache: Callable[[], Path] | None = None
_hashes_reads = False
_while_read: dict[tuple[Path, State], str] = {}  # digests of files that were read just now
_mode = "read"  # or "identity", "known"


def use_cache(folder: Callable[[], Path]) -> None:
    """Remember digests in a folder, which is asked for when the first file is hashed."""
    global _cache
    _cache = folder


def hash_files(files: Iterable[Path], *settings: str) -> str:
    """Return the sha256 of the settings and of each file's name and bytes, in order."""
    total = hashlib.sha256(repr(settings).encode())
    for path in files:
        content = _identity(path) if _mode == "identity" else file_digest(path)
        total.update(os.fsencode(file_name(path)) + f"\0{content}\n".encode())
    return total.hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's content, which is read unless its digest is remembered.

    Raises:
        UserError: it cannot be read.
    """
    try:
        state = _hashed[path] = file_state(path)
        if known := known_digest(path, state):
            return known
        if _mode == "known":
            raise UnknownDigestError(path)
        content = _while_read.pop((path, state), "")
        if not content:
            with raw_file(path) as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        if not isinstance(path, Path):
            require_unchanged(path)  # its state is that of its listing
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    remember_digest(path, state, content)
    return content


def known_digest(path: Path, state: State) -> str | None:
    """Return the digest that is remembered of a file in a state; None if there is none."""
    digests = _opened()
    return digests.find(path, state) if digests else None


def remember_digest(path: Path, state: State, digest: str) -> None:
    """Remember the digest of a file, unless it changed since, or so lately that it may again."""
    digests = _opened()
    if digests and not _is_racy(state) and file_state(path) == state:
        digests.add(path, state, digest)


class UnknownDigestError(Exception):
    """Error of a file that would have to be read."""


@contextmanager
def hashing(mode: str) -> Iterator[None]:
    """Let `hash_files` do otherwise than read contents.

    Args:
        mode: "identity": it takes sizes and modification times in place of contents; "known": it
            raises UnknownDigestError where a digest is not remembered.
    """
    global _mode
    before, _mode = _mode, mode
    try:
        yield
    finally:
        _mode = before


def _identity(path: Path) -> str:
    """Return size and modification time, the same for copies on several hosts.

    Of a file that has just changed they are waited for until they tell it from what it becomes.
    """
    try:
        state = file_state(path)
        if 0 <= (age := time.time_ns() - state[0]) < _RACY_NS:
            time.sleep((_RACY_NS - age) / 1e9)
            state = file_state(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    mtime, _, size, _ = state
    return file_digest(path) if _is_racy(state) else f"{size} bytes of {mtime}"


def forget_file(path: Path) -> None:
    """Forget the state of a file: it may have changed since another source read it."""
    _hashed.pop(path, None)


def require_unchanged(path: Path, since: State | None = None) -> None:
    """Raise UserError if a file has changed since a state, by default since it was hashed."""
    if not isinstance(path, Path):
        from lm.data.remote import require_listed

        require_listed(path)
    state = file_state(path)
    if (since or _hashed.get(path, state)) != state:
        raise UserError(f"{path}: changed while it was read: start again when it is complete")


def file_state(path: Path) -> State:
    """Return what changes whenever a file does: its times, size and identity.

    Of a file by URL its version and size, as they were listed (`remote.remote_state`).
    """
    if not isinstance(path, Path):
        from lm.data.remote import remote_state

        return remote_state(path)
    status = os.stat(path)
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def raw_file(path: Path) -> io.BufferedReader:
    """Open a local file, or one by URL, to read its bytes as they are stored.

    Raises:
        OSError: it cannot be opened.
        UserError: it is a URL that cannot be read; from `read` too.
    """
    file = _opened_file(path)
    if not _hashes_reads or known_digest(path, file_state(path)):
        return file
    return io.BufferedReader(_HashedReads(file.detach(), path), 2**20)


def _opened_file(path: Path) -> io.BufferedReader:
    if isinstance(path, Path):
        return open(path, "rb")
    from lm.data.remote import open_remote

    return open_remote(path)


@contextmanager
def hashing_reads() -> Iterator[None]:
    """Hash files while they are read to the end; `file_digest` then need not read them."""
    global _hashes_reads
    _hashes_reads = True
    try:
        yield
    finally:
        _hashes_reads = False
        _while_read.clear()


class _HashedReads(io.RawIOBase):
    """File whose digest is known once it was read in order to its end."""

    def __init__(self, file: Any, path: Path):
        self._file, self._key = file, (path, file_state(path))
        self._hash, self._hashed = hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._file.seek(offset, whence)

    def readinto(self, buffer: Any, /) -> int | None:
        in_order = self._hashed == self._file.tell()
        n = self._file.readinto(buffer)
        if in_order and n:
            self._hash.update(memoryview(buffer)[:n])
            self._hashed += n
        elif in_order:
            _while_read[self._key] = self._hash.hexdigest()
        return n

    def close(self) -> None:
        self._file.close()
        super().close()


def _is_racy(state: State) -> bool:
    return time.time_ns() - state[0] < _RACY_NS


# --- the file of digests


def _key(path: Path) -> str:
    return os.path.abspath(path) if isinstance(path, Path) else str(path)


class _DigestFile:
    def __init__(self, path: Path):
        self._path = path
        self._known: dict[str, tuple[State, str]] = {}
        self._identity, self._read, self._n_lines = 0, 0, 0

    def find(self, path: Path, state: State) -> str | None:
        key = _key(path)
        if self._known.get(key, ((), ""))[0] != state:
            self._read_on()  # what other processes added
        known = self._known.get(key)
        return known[1] if known and known[0] == state else None

    def add(self, path: Path, state: State, digest: str) -> None:
        key = _key(path)
        self._known[key] = state, digest
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _append(self._path, f"\n{json.dumps([key, state, digest])}\n".encode())
        except OSError:
            pass  # on a disk that is full or read-only files are hashed at every start

    def _read_on(self) -> None:
        """Read the lines from where the last reading ended."""
        try:
            with open(self._path, "rb") as file:
                if (identity := os.fstat(file.fileno()).st_ino) != self._identity:
                    self._identity, self._read, self._n_lines = identity, 0, 0
                file.seek(self._read)
                content = file.read()
        except OSError:
            return
        whole = content.rpartition(b"\n")[0]
        self._read += len(whole)
        lines = whole.split(b"\n")
        for line in lines:
            if entry := _parsed(line):
                self._known[entry[0]] = entry[1], entry[2]
                self._n_lines += 1
        if self._n_lines > 2 * len(self._known) + _SPARE_LINES:
            self._rewrite()

    def _rewrite(self) -> None:
        """Write the file without the lines that are out of date; one being added may be lost."""
        temporary = self._path.with_name(f".{_NAME}.{os.getpid()}")
        lines = (json.dumps([key, *entry]) for key, entry in self._known.items())
        try:
            temporary.write_text("\n".join([*lines, ""]))
            temporary.replace(self._path)
        except OSError:
            temporary.unlink(missing_ok=True)


def _append(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(descriptor, content)
    finally:
        os.close(descriptor)


def _parsed(line: bytes) -> tuple[str, State, str] | None:
    """Return path, state and digest of a line; None if it is not whole."""
    try:
        path, state, digest = json.loads(line)
        if isinstance(path, str) and len(digest) == 64 and all(type(n) is int for n in state):
            return path, tuple(state), digest
    except (ValueError, TypeError, RecursionError):
        pass
    return None


_files: dict[Path, _DigestFile] = {}


def _opened() -> _DigestFile | None:
    if _cache is None:
        return None
    path = _cache() / _NAME
    return _files.setdefault(path, _DigestFile(path))
