"""Files of the user: finding, reading (plain or .gz, always UTF-8) and hashing them."""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lm.errors import UserError

_CHUNK = 2**20


def data_directory(data: Any) -> Path:
    """Return the folder that relative paths start from: `data.directory`, LM_DATA_DIR, or ."""
    return Path(data.directory or os.environ.get("LM_DATA_DIR") or ".").expanduser()


def find_file(path: str, data: Any) -> Path:
    """Return the file or folder at a path relative to the data directory.

    Raises:
        UserError: it does not exist.
    """
    found = data_directory(data) / Path(path).expanduser()
    if not found.exists():
        raise _missing(path, data)
    return found


def find_files(pattern: str, data: Any) -> tuple[Path, ...]:
    """Return the files that a path or glob names, sorted.

    Raises:
        UserError: there is none.
    """
    place = data_directory(data) / Path(pattern).expanduser()
    if place.is_file():
        return (place,)
    found = (Path(name) for name in glob.glob(str(place), recursive=True))
    files = tuple(sorted(path for path in found if path.is_file()))
    if not files:
        raise _missing(pattern, data)
    return files


def _missing(path: str, data: Any) -> UserError:
    if not path:
        return UserError("the path after ':' is empty: name a file, such as text:input.txt")
    folder = "" if Path(path).is_absolute() else f" in {data_directory(data).absolute()}"
    advice = "set LM_DATA_DIR or --config.data.directory to the folder that holds it"
    return UserError(f"no file matches {path!r}{folder}: {advice}")


def read_text(path: Path) -> Iterator[str]:
    """Yield the text of a file in chunks, newlines untouched.

    Raises:
        UserError: the (decompressed) file is not UTF-8 at a byte, which the message names.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    consumed = 0
    for chunk in read_bytes(path):
        yield _decode(decoder, chunk, path, consumed)
        consumed += len(chunk)
    yield _decode(decoder, b"", path, consumed, final=True)


def _decode(
    decoder: codecs.IncrementalDecoder, chunk: bytes, path: Path, consumed: int, final: bool = False
) -> str:
    try:
        return decoder.decode(chunk, final)
    except UnicodeDecodeError as error:
        kept_back = len(error.object) - len(chunk)
        offset = consumed - kept_back + error.start
        raise UserError(f"{path}: not UTF-8 at byte {offset}: convert the file first") from error


def read_bytes(path: Path) -> Iterator[bytes]:
    """Yield the (decompressed) bytes of a file in chunks; UserError if it cannot be read."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip file ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def read_lines(path: Path) -> Iterator[str]:
    r"""Yield the lines of a UTF-8 file without their "\n" or "\r\n"."""
    rest = ""
    for chunk in read_text(path):
        *lines, rest = (rest + chunk).split("\n")
        yield from (line.removesuffix("\r") for line in lines)
    if rest:
        yield rest.removesuffix("\r")


def hash_files(files: Iterable[Path], *settings: str) -> str:
    """Return the sha256 of the settings and of each file's name and bytes, in order."""
    total = hashlib.sha256(repr(settings).encode())
    for path in files:
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.name}\0{content}\n".encode())
    return total.hexdigest()
