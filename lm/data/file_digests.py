"""Digests of the user's files, and noticing that a file changed since it was hashed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from lm.errors import UserError

# State of the files when they were hashed, to notice that one changes while it is read.
_hashed: dict[Path, tuple[int, ...]] = {}


def hash_files(files: Iterable[Path], *settings: str) -> str:
    """Return the sha256 of the settings and of each file's name and bytes, in order."""
    total = hashlib.sha256(repr(settings).encode())
    for path in files:
        try:
            _hashed[path] = _state(path)
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        total.update(os.fsencode(path.name) + f"\0{content}\n".encode())
    return total.hexdigest()


def forget_file(path: Path) -> None:
    """Forget the state of a file: it may have changed since another source read it."""
    _hashed.pop(path, None)


def require_unchanged(path: Path) -> None:
    """Raise UserError if a file has changed since it was hashed."""
    if _hashed.get(path, state := _state(path)) != state:
        raise UserError(f"{path}: changed while it was read: start again when it is complete")


def _state(path: Path) -> tuple[int, ...]:
    """Return what changes whenever a file does: its times, size and identity."""
    status = os.stat(path)
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino
