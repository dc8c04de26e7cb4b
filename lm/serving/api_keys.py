"""Keys of clients, a line each in a file that is read again when it changes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm.data.files import read_text
from lm.errors import UserError


class ApiKeys:
    """Keys of a file; empty lines and what follows # are no keys."""

    def __init__(self, file: Path, log: Callable[[str], Any]):
        """Read the file.

        Args:
            file: the file.
            log: receives a line when it has become unreadable: the keys stay as they were.

        Raises:
            UserError: it cannot be read, or has no key.
        """
        self._file, self._log = file, log
        self._stamp: tuple[int, int] | None = None
        self._digests: frozenset[bytes] = frozenset()
        self._read()

    def allows(self, authorization: bytes) -> bool:
        """Return whether a header "Bearer KEY" has one of the keys."""
        try:
            self._read()
        except UserError as error:
            self._log(f"the keys stay as they were: {error}")
        scheme, _, key = authorization.partition(b" ")
        # Digests are compared, so that the time says nothing of a key.
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
