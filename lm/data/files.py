"""User files: finding and reading them (plain or compressed, always UTF-8).

Byte order marks are dropped, and files that change while being read are detected.
"""

from __future__ import annotations

import codecs
import glob
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lm.data.compression import Decompressed, compression_of, refuse_compressed
from lm.data.file_digests import forget_file, raw_file, require_unchanged, use_cache
from lm.errors import UserError
from lm.storage import cache_directory, plain_place

_CHUNK = 2**20


_told: set[tuple[str, Path | str]] = set()


def data_directory(data: Any) -> Path:
    """Return the base folder of relative paths: `data.directory`, LM_DATA_DIR or "."."""
    return resolve_file(_directory(data))


def _directory(data: Any) -> str:
    return data.directory or os.environ.get("LM_DATA_DIR") or "."


def resolve_file(path: str, data: Any = None) -> Any:
    """Resolve a file path or glob to a `Path`, or a `UPath` for a URL.

    Args:
        path: path or URL; the data directory may be a URL too.
        data: section `data` of the configuration; None leaves relative paths unchanged.

    Raises:
        UserError: the home directory or URL scheme is unknown.
    """
    directory = "" if data is None else _directory(data)
    path, directory = plain_place(path), plain_place(directory)
    if "://" not in path + directory:
        return _expand(directory) / _expand(path)
    from lm.data.remote import is_url, remote_path

    if is_url(path):
        return remote_path(path)
    if is_url(directory) and not Path(path).is_absolute():
        return remote_path(f"{directory.rstrip('/')}/{path}")
    return _expand(directory) / _expand(path)


def is_folder(path: Any) -> bool:
    """Return whether a path is a folder, local or in a bucket."""
    if isinstance(path, Path):
        return os.path.isdir(path)
    from lm.data.remote import remote_is_folder

    return remote_is_folder(path)


def _expand(path: str) -> Path:
    """Expand ~ in a path; UserError if the home directory is unknown."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: {error} (is HOME set?)") from error


def find_file(path: str, data: Any) -> Path:
    """Return the file or folder at a path relative to the data directory.

    Raises:
        UserError: it does not exist.
    """
    found = resolve_file(path, data)
    if isinstance(found, Path):
        exists = os.path.exists(found)
    else:
        from lm.data.remote import remote_exists

        exists = remote_exists(found)
    if not exists:
        raise _missing(path, data)
    return found


def find_files(pattern: str, data: Any) -> tuple[Path, ...]:
    """Return the sorted files of a path or glob; links to files already listed are dropped.

    A name that exists is taken literally, even with brackets or stars.

    Raises:
        UserError: there are none, or a folder cannot be read.
    """
    use_cache(lambda: cache_directory(data))
    place = resolve_file(pattern, data)
    if not isinstance(place, Path):
        from lm.data.remote import find_remote_files

        there: Any = find_remote_files(place)
        if not there:
            raise _missing(pattern, data)
        return there
    if os.path.isfile(place):
        found = [place]
    else:
        found = sorted(path for path in _matches(place) if os.path.isfile(path))
    if not found:
        raise _missing(pattern, data)
    files: dict[str, Path] = {}
    for path in sorted(found, key=Path.is_symlink):
        real = os.path.realpath(path)
        if real in files:
            tell_once(f"is the same file as {files[real]}; reading it once", path)
        else:
            files[real] = path
            forget_file(path)
    return tuple(sorted(files.values()))


def _matches(place: Path) -> Iterator[Path]:
    """Yield matches of a glob; "**" enters no folder twice, even through links."""
    pattern, existing = "", True
    for number, part in enumerate(place.parts):
        if part == "**":
            rest = place.parts[number + 1 :] or ("*",)
            for start in sorted(glob.glob(pattern or ".")):
                for folder in _folders(start):
                    yield from _matches(Path(folder, *rest))
            return
        taken = os.path.join(pattern, glob.escape(part))
        existing = existing and bool(glob.glob(taken))
        pattern = taken if existing else os.path.join(pattern, part)
    yield from (Path(name) for name in glob.glob(pattern))


def _folders(start: str) -> Iterator[str]:
    """Yield a folder and its non-hidden subfolders, each once, linked ones last."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        folder = waiting.pop(0)
        real = os.path.realpath(folder)
        if real in seen or not os.path.isdir(folder):
            continue
        seen.add(real)
        yield folder
        try:
            names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
        except OSError as error:
            raise UserError(f"{folder}: cannot be read ({error.strerror})") from error
        inner = [os.path.join(folder, name) for name in names]
        waiting += sorted(filter(os.path.isdir, inner), key=os.path.islink)


def tell_once(message: str, path: Path | str) -> None:
    """Print a message about a file or source on stderr, once."""
    if (message, path) not in _told:
        _told.add((message, path))
        print(f"{path}: {message}", file=sys.stderr)


def without_mark(text: str, path: Path) -> str:
    """Drop the byte order mark at the start of a file's text, with a message once."""
    if not text.startswith("\ufeff"):
        return text
    tell_once("skipping the byte order mark at its start", path)
    return text[1:]


def _missing(path: str, data: Any) -> UserError:
    if not path:
        return UserError("the path after ':' is empty: name a file, such as text:input.txt")
    if "://" in path:
        return UserError(f"no file matches {path}")
    if os.path.isdir(place := resolve_file(path, data)):
        return UserError(f"{place}: is a folder: name its files, such as {place}/*")
    folder = "" if Path(path).is_absolute() else f" in {_absolute(data)}"
    advice = (
        "set LM_DATA_DIR or --config.data.directory to the folder that holds it"
        r"; a comma in a name is written \,"
    )
    return UserError(f"no file matches {path!r}{folder}: {advice}")


def _absolute(data: Any) -> str:
    directory = data_directory(data)
    return str(directory.absolute() if isinstance(directory, Path) else directory)


def read_text(path: Path) -> Iterator[str]:
    """Yield the text of a file in chunks, with newlines unchanged and no byte order mark.

    Raises:
        UserError: the (decompressed) file is not UTF-8; the message gives the byte offset.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    consumed, start = 0, True
    for chunk in read_bytes(path):
        text = _decode(decoder, chunk, path, consumed)
        yield without_mark(text, path) if start else text
        start = start and not text
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
        raise not_utf8(path, offset) from error


def not_utf8(path: Path, offset: int) -> UserError:
    """Return the error for a (decompressed) file that is not UTF-8 at a byte offset."""
    return UserError(f"{path}: not UTF-8 at byte {offset}: convert the file first")


def read_bytes(path: Path) -> Iterator[bytes]:
    """Yield the (decompressed) bytes of a file in chunks.

    Raises:
        UserError: it cannot be read, or has changed since it was hashed.
    """
    try:
        with open_file(path) as file:
            while chunk := file.read(_CHUNK):
                yield chunk
        require_unchanged(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def open_file(path: Path) -> io.BufferedIOBase:
    """Open a file for sequential reading, decompressed by its suffix (`compression.ENDINGS`).

    Raises:
        UserError: the content does not match the suffix; `read` also raises it for damaged or
            truncated files.
        OSError: the file cannot be opened.
    """
    file = raw_file(path)
    kind = compression_of(path)
    if kind:
        return Decompressed(file, kind, path)
    try:
        refuse_compressed(file.peek(512), path)
    except BaseException:
        file.close()
        raise
    return file


def read_lines(path: Path) -> Iterator[str]:
    r"""Yield the lines of a UTF-8 file without their "\n" or "\r\n"."""
    rest = ""
    for chunk in read_text(path):
        *lines, rest = (rest + chunk).split("\n")
        yield from (line.removesuffix("\r") for line in lines)
    if rest:
        yield rest.removesuffix("\r")
