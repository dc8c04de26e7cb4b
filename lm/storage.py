"""Storage: local folders, runs in a bucket (gs://BUCKET/PATH), and atomic files.

Checkpoints of a run in a bucket are written there directly. Its small files (configuration,
tokenizer, metrics, reports) are kept in a temporary local copy, one a process: `open_folder`
downloads it and `push` uploads what changed since, so that all other code sees local folders.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from etils import epath

from lm.errors import UserError

AnyPath: TypeAlias = "Path | epath.Path"

_SCHEME = "gs://"
_NOT_COPIED = {"checkpoints", "damaged", "tensorboard"}


@dataclass
class _Copy:
    """`sent` holds the size and time of change of every file, as they were when last sent."""

    address: epath.Path
    folder: Path
    sent: dict[Path, tuple[int, int]] = field(default_factory=dict)


_copies: dict[str, _Copy] = {}  # by address


def locate(place: str) -> AnyPath:
    """Where a folder is, of this machine or gs://…; UserError for other addresses."""
    if "://" not in place:
        return Path(place)
    if not place.startswith(_SCHEME):
        raise UserError(f"{place}: a folder, or a bucket's gs://BUCKET/PATH")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{place} needs gcsfs: pip install 'lm[gcs]'")
    import fsspec

    logging.getLogger("gcsfs").setLevel(logging.ERROR)  # it warns wherever it has few rights
    # What other processes wrote must be seen.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return epath.Path(place.rstrip("/"))


def open_folder(place: str) -> Path:
    """A folder of this machine; of gs://… this process's copy, without its checkpoints."""
    address = locate(place)
    if isinstance(address, Path):
        return address
    if str(address) not in _copies:
        copy = _Copy(address, Path(tempfile.mkdtemp(prefix="lm-")) / address.name)
        copy.folder.mkdir()
        with _refusals(address):
            _fetch(address, copy.folder)
        copy.sent = _state(copy.folder)
        _copies[str(address)] = copy
    return _copies[str(address)].folder


def push() -> None:
    """Send what changed in the open copies to their buckets."""
    for copy in _copies.values():
        now = _state(copy.folder)
        for file, state in now.items():
            if copy.sent.get(file) != state:
                content = (copy.folder / file).read_bytes()
                with _refusals(copy.address):
                    (copy.address / file).write_bytes(content)
        copy.sent = now


@contextmanager
def copies() -> Iterator[None]:
    """At its end what changed is sent, unless something was raised, and the copies are removed."""
    try:
        yield
        push()
    finally:
        for copy in _copies.values():
            shutil.rmtree(copy.folder.parent, ignore_errors=True)
        _copies.clear()


def origin(path: AnyPath) -> AnyPath:
    """Where a path really is, from the root: that inside a copy belongs to a bucket."""
    if isinstance(path, Path):
        path = path.absolute()
        for copy in _copies.values():
            if path.is_relative_to(copy.folder):
                return copy.address / path.relative_to(copy.folder)
    return path


def is_whole(checkpoint: AnyPath) -> bool:
    """Whether a checkpoint is finished: here its folder is renamed then, in a bucket marked."""
    return isinstance(checkpoint, Path) or (checkpoint / "commit_success.txt").exists()


@contextmanager
def _refusals(address: epath.Path) -> Iterator[None]:
    """Turn what would be refused again into one line: no such bucket, no right to use it."""
    from gcsfs.retry import HttpError, is_retriable

    try:
        yield
    except (OSError, HttpError) as error:
        if is_retriable(error):
            raise
        problem = " ".join(str(error).split())
        raise UserError(f"{address}: {type(error).__name__}: {problem}") from error


def _fetch(source: epath.Path, target: Path) -> None:
    if not source.is_dir():
        return
    for path in source.iterdir():
        if path.name in _NOT_COPIED:
            continue
        if path.is_dir():
            (target / path.name).mkdir()
            _fetch(path, target / path.name)
        else:
            (target / path.name).write_bytes(path.read_bytes())


def _state(folder: Path) -> dict[Path, tuple[int, int]]:
    files = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path.relative_to(folder): (s.st_size, s.st_mtime_ns) for path, s in files.items()}


def write_atomically(file: Path, text: str) -> None:
    """Replace `file` by `text`; a reader, or a crash, sees the old or the new, never a part."""
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


T = TypeVar("T")


class Damaged(Exception):
    """A finished folder does not hold what it should."""


def cache_directory(data: Any) -> Path:
    """`data.cache_directory`, LM_CACHE_DIR, or ~/.cache/lm."""
    chosen = data.cache_directory or os.environ.get("LM_CACHE_DIR") or "~/.cache/lm"
    return Path(chosen).expanduser()


def open_or_build(folder: Path, read: Callable[[Path], T], build: Callable[[Path], None]) -> T:
    """Returns `read(folder)`, after `build` has filled the folder if that is needed.

    One process builds, in a sibling folder that is renamed at the end, while others wait for its
    lock. What a killed build left is removed, and a folder that `read` finds `Damaged` rebuilt;
    both are said on stderr. UserError if the disk is full or the place not writable.
    """
    try:
        if folder.exists():
            return read(folder)
    except Damaged:
        pass  # looked at again under the lock
    with _disk_errors(folder), _lock(folder):
        if folder.exists():
            try:
                return read(folder)
            except Damaged as damage:
                _say(f"{folder} is damaged ({damage}): building it again")
                shutil.rmtree(folder)
        partial = folder.with_name(folder.name + ".partial")
        if partial.exists():
            _say(f"a build of {folder} was interrupted: building it again")
            shutil.rmtree(partial)
        partial.mkdir()
        try:
            build(partial)
            _flush(partial)
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _flush(folder.parent)
        return read(folder)


def write_durably(path: Path, content: bytes) -> None:
    """Writes a file and waits until it is on the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(folder.name + ".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    advice = "set LM_CACHE_DIR or --config.data.cache_directory to another disk"
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk is full while writing {folder}: {advice}") from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UserError(f"{folder} cannot be written ({error.strerror}): {advice}") from error
        raise


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _say(message: str) -> None:
    print(message, file=sys.stderr)
