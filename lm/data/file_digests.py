"""Digests of user files, cached across starts, and detection of files that change while in use.

The cache file `digests.jsonl` has one line per file with its path, state (times, size, identity)
and the sha256 of its content, which is valid as long as the state is unchanged. Processes append
whole lines; a line truncated by a kill is ignored.
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
# A file may change twice within the resolution of its timestamps: rehash files newer than this.
_RACY_NS = 2 * 10**9
_SPARE_LINES = 1000  # outdated lines before the file is rewritten

# State of each file when it was hashed, to detect changes while it is read.
_hashed: dict[Path, State] = {}
_cache: Callable[[], Path] | None = None
_hashes_reads = False
_while_read: dict[tuple[Path, State], str] = {}  # digests of files that were just read
_mode = "read"  # or "identity", "known"


def use_cache(folder: Callable[[], Path]) -> None:
    """Cache digests in a folder, which is resolved when the first file is hashed."""
    global _cache
    _cache = folder


def hash_files(files: Iterable[Path], *settings: str) -> str:
    """Return the sha256 of settings and of each file's name and content, in order."""
    total = hashlib.sha256(repr(settings).encode())
    for path in files:
        content = _identity(path) if _mode == "identity" else file_digest(path)
        total.update(os.fsencode(file_name(path)) + f"\0{content}\n".encode())
    return total.hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's content, cached by its state.

    Raises:
        UserError: the file cannot be read.
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
            require_unchanged(path)  # its state is that of the listing
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    remember_digest(path, state, content)
    return content


def known_digest(path: Path, state: State) -> str | None:
    """Return the cached digest of a file in this state, or None."""
    digests = _opened()
    return digests.find(path, state) if digests else None


def remember_digest(path: Path, state: State, digest: str) -> None:
    """Cache the digest of a file, unless it changed or is too new to detect changes."""
    digests = _opened()
    if digests and not _is_racy(state) and file_state(path) == state:
        digests.add(path, state, digest)


class UnknownDigestError(Exception):
    """Error of a file that is not cached and would have to be read."""


@contextmanager
def hashing(mode: str) -> Iterator[None]:
    """Change how `hash_files` identifies contents.

    Args:
        mode: "identity": hash sizes and modification times instead of contents; "known": raise
            UnknownDigestError if a digest is not cached.
    """
    global _mode
    before, _mode = _mode, mode
    try:
        yield
    finally:
        _mode = before


def _identity(path: Path) -> str:
    """Return size and modification time, which are the same for copies on several hosts.

    Waits if the file is so new that a later change might not alter its modification time.
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
    """Forget the state of a file, which may have changed since another source read it."""
    _hashed.pop(path, None)


def require_unchanged(path: Path, since: State | None = None) -> None:
    """Raise UserError if a file has changed since `since` (default: since it was hashed)."""
    if not isinstance(path, Path):
        from lm.data.remote import require_listed

        require_listed(path)
    state = file_state(path)
    if (since or _hashed.get(path, state)) != state:
        raise UserError(f"{path}: changed while it was read: start again when it is complete")


def file_state(path: Path) -> State:
    """Return a file's state, which changes whenever the file does: times, size and identity.

    For a URL: version and size from its listing (`remote.remote_state`).
    """
    if not isinstance(path, Path):
        from lm.data.remote import remote_state

        return remote_state(path)
    status = os.stat(path)
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def raw_file(path: Path) -> io.BufferedReader:
    """Open a local file or URL to read its raw (compressed) bytes.

    Raises:
        OSError: the file cannot be opened.
        UserError: the URL cannot be read; `read` may raise it too.
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
    """Hash files while they are read, so that `file_digest` need not read them again."""
    global _hashes_reads
    _hashes_reads = True
    try:
        yield
    finally:
        _hashes_reads = False
        _while_read.clear()


class _HashedReads(io.RawIOBase):
    """File that is hashed while being read sequentially to its end."""

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


# --- the digest cache


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
            self._read_on()  # lines that other processes added
        known = self._known.get(key)
        return known[1] if known and known[0] == state else None

    def add(self, path: Path, state: State, digest: str) -> None:
        key = _key(path)
        self._known[key] = state, digest
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _append(self._path, f"\n{json.dumps([key, state, digest])}\n".encode())
        except OSError:
            pass  # on a full or read-only disk, files are hashed at every start

    def _read_on(self) -> None:
        """Read lines from where the last read ended."""
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
        """Rewrite the file without outdated lines; a line being appended may be lost."""
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
    """Parse path, state and digest of a line; None if it is truncated."""
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
