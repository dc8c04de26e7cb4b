"""Compressed files: gzip, zstd, bzip2 and xz, selected by file suffix.

Several members, frames or streams are concatenated. A wrong checksum, length or missing end marker
is an error, and so is trailing data.
"""

from __future__ import annotations

import bz2
import io
import lzma
import tarfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lm.errors import UserError, missing_package

ENDINGS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}

_MAGIC = {
    b"\x1f\x8b\x08": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\0": "xz",
    b"BZh91AY&SY": "bzip2",
    b"PK\x03\x04": "zip",
}
_PADDED = ("gzip", "xz")  # streams may be followed by zeros
_READ = 2**18  # compressed bytes
_MAX_WINDOW_LOG = 31  # zstd --long=31


def file_name(path: Path) -> str:
    """Return the name of a file; for a URL without "?" and what follows."""
    return path.name if isinstance(path, Path) else path.name.partition("?")[0]


def compression_of(path: Path) -> str:
    """Return the compression that the file suffix indicates, or ""."""
    return ENDINGS.get(Path(file_name(path)).suffix.lower(), "")


def refuse_compressed(start: bytes, path: Path) -> None:
    """Raise UserError if a file without such a suffix looks compressed or like an archive."""
    _refuse_archive(start, path)
    kind = _kind(start)
    if kind:
        ending = next((ending for ending, name in ENDINGS.items() if name == kind), "")
        advice = f"rename it to end in {ending}" if ending else "use gzip and .gz"
        raise UserError(f"{path}: compressed ({kind}): decompress it, or {advice}")


def _refuse_archive(start: bytes, path: Path) -> None:
    if b"\0" in start[:512]:
        with suppress(tarfile.HeaderError):
            tarfile.TarInfo.frombuf(start[:512], "utf-8", "replace")
            raise UserError(f"{path}: is a tar archive: unpack it, and name the files in it")


def _kind(start: bytes) -> str:
    return next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), "")


class Decompressed(io.BufferedIOBase):
    """Decompressed bytes of a file, read sequentially in bounded memory.

    `read` raises UserError if the file is damaged or truncated. An empty file is valid.
    """

    def __init__(self, file: io.BufferedIOBase, kind: str, path: Path):
        """Wrap an open file.

        Args:
            file: compressed file; closed with this one.
            kind: value of `ENDINGS`.
            path: path for messages.

        Raises:
            UserError: the zstd package is not installed.
        """
        self._file, self._kind, self._path = file, kind, path
        try:
            self._new, self._errors = _DECOMPRESSORS[kind](path)
        except BaseException:
            file.close()
            raise
        self._decompressor: Any = None  # None between two streams
        self._input, self._first, self._place = b"", True, 0
        self._begins = False  # the stream has the magic bytes of its kind

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            return b"".join(iter(lambda: self.read(2**20), b""))
        while size:
            if not self._input and not (self._decompressor and self._holds_back()):
                self._input = self._file.read(_READ)
                if not self._input:
                    return self._rest(size)
            if (self._decompressor or self._start()) and (found := self._decompress(size)):
                return found
        return b""

    def _rest(self, size: int) -> bytes:
        """Return remaining output at the end of the file."""
        found = self._decompress(size) if self._decompressor else b""
        if self._decompressor and not found:
            raise self._damage("it is truncated")
        return found

    def close(self) -> None:
        self._file.close()
        super().close()

    def _holds_back(self) -> bool:
        """Return whether the decompressor can continue without input."""
        return not self._decompressor.needs_input

    def _start(self) -> bool:
        """Start a stream at the current input; False if there is only padding."""
        if not self._first and self._kind in _PADDED:
            self._input = self._input.lstrip(b"\0")
            if not self._input:
                return False
        other = _kind(self._input)
        if other not in (self._kind, ""):
            raise self._damage(f"its content is {other}")
        self._begins = other == self._kind
        self._decompressor, self._first = self._new(), False
        return True

    def _decompress(self, size: int) -> bytes:
        try:
            found = self._decompressor.decompress(self._input, size)
        except self._errors as error:
            problem = str(error) if self._begins else f"its content is not {self._kind}"
            raise self._damage(problem) from error
        self._input = b""
        if not self._place:
            _refuse_archive(found, self._path)
        self._place += len(found)
        if self._decompressor.eof:
            self._input, self._decompressor = self._decompressor.unused_data, None
        return found

    def _damage(self, problem: str) -> UserError:
        return UserError(f"{self._path}: damaged {self._kind} file ({problem})")


class _Gzip:
    """Decompressor of one gzip member, with the interface of bz2 and lzma."""

    def __init__(self) -> None:
        self._inflate = zlib.decompressobj(wbits=31)  # checks length and CRC-32

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._inflate.decompress(self._inflate.unconsumed_tail + data, max_length)

    @property
    def needs_input(self) -> bool:
        return not self._inflate.unconsumed_tail

    @property
    def eof(self) -> bool:
        return self._inflate.eof

    @property
    def unused_data(self) -> bytes:
        return self._inflate.unused_data


_Opened = tuple[Callable[[], Any], tuple[type[Exception], ...]]


def _zstd(path: Path) -> _Opened:
    try:
        from backports import zstd
    except ImportError as error:
        raise missing_package(str(path), "backports.zstd", "zstd") from error
    options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: _MAX_WINDOW_LOG}
    return lambda: zstd.ZstdDecompressor(options=options), (zstd.ZstdError,)


_DECOMPRESSORS: dict[str, Callable[[Path], _Opened]] = {
    "gzip": lambda path: (_Gzip, (zlib.error,)),
    "zstd": _zstd,
    "bzip2": lambda path: (bz2.BZ2Decompressor, (OSError, ValueError)),
    "xz": lambda path: (lzma.LZMADecompressor, (lzma.LZMAError,)),
}
