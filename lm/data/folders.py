"""Cache folders that several processes can ask for, and that are whole or not there at all."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from lm.errors import UserError

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
