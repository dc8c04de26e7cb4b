"""Client keys, one per line in a file that is reloaded when it changes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm.data.files import read_text
from lm.errors import UserError


class ApiKeys:
    """Keys from a file; empty lines and comments (#) are ignored."""

    def __init__(self, file: Path, log: Callable[[str], Any]):
        """Read the file.

        Args:
            file: the file.
            log: called with a line if it becomes unreadable; the old keys stay valid.

        Raises:
            UserError: it cannot be read, or has no key.
        """
        self._file, self._log = file, log
        self._stamp: tuple[int, int] | None = None
        self._digests: frozenset[bytes] = frozenset()
        self._read()

    def allows(self, authorization: bytes) -> bool:
        """Return whether a header "Bearer KEY" has a valid key."""
        try:
            self._read()
        except UserError as error:
            self._log(f"the keys stay as they were: {error}")
        scheme, _, key = authorization.partition(b" ")
        # Compare digests, so that timing reveals nothing about a key.
        return scheme.lower() == b"bearer" and _digest(key.strip()) in self._digests

    def _read(self) -> None:
        try:
            found = self._file.stat()
            stamp = found.st_mtime_ns, found.st_size
            if stamp == self._stamp:
                return
            self._stamp = stamp
            text = "".join(read_text(self._file))
        except OSError as error:
            raise UserError(f"{self._file}: {error.strerror}") from None
        lines = (line.partition("#")[0].strip() for line in text.splitlines())
        digests = frozenset(_digest(line.encode()) for line in lines if line)
        if not digests:
            raise UserError(f"{self._file}: no keys found; write one per line")
        self._digests = digests


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
