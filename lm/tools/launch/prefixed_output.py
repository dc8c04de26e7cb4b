"""What a process prints, passed on line by line under a tag, its last words remembered."""

from __future__ import annotations

import re
import threading
from typing import IO, BinaryIO

ERROR = re.compile(r"error:|([A-Za-z_]\w*\.)*[A-Za-z_]\w*(Error|Exception)\b")
_write = threading.Lock()  # lines of several processes stay whole


class TaggedOutput:
    """Copies a pipe to a stream, every line with a tag, in a thread of its own.

    A carriage return ends a line too, so that progress bars show.
    """

    def __init__(self, pipe: IO[bytes], stream: BinaryIO, tag: str):
        self._pipe, self._stream, self._tag = pipe, stream, tag.encode()
        self._last = self._error = ""
        self._thread = threading.Thread(target=self._copy, daemon=True)
        self._thread.start()

    def _copy(self) -> None:
        part = b""
        while chunk := self._pipe.read1(65536):  # type: ignore[attr-defined]
            *lines, part = re.split(rb"[\r\n]+", part + chunk)
            self._pass_on(lines)
        self._pass_on([part])

    def _pass_on(self, lines: list[bytes]) -> None:
        lines = [line for line in lines if line.strip()]
        for line in lines:
            self._last = line.decode(errors="replace").strip()
            if ERROR.match(self._last):
                self._error = self._last
        if lines:
            with _write:
                self._stream.write(b"".join(self._tag + line + b"\n" for line in lines))
                self._stream.flush()

    def last_words(self) -> str:
        """The last line that reports an error, else the last line; after the process has ended."""
        self._thread.join(timeout=2)  # a grandchild may keep the pipe open
        return (self._error or self._last)[:300]
