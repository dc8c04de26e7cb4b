"""Storage: run folders, atomic files, the cache and JSON reading.

A run may be in a bucket (gs://BUCKET/PATH, `bucket.py`). Checkpoints are written there directly.
Its small files (configuration, tokenizer, metrics, reports) are mirrored to a temporary local copy
per process: `open_run_folder` downloads it and `upload_changes` uploads what changed since, so all
other code sees local folders.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from etils import epath

from lm.errors import UserError

if TYPE_CHECKING:  # imported at run time only for runs in a bucket
    from lm.storage.bucket import LocalCopy

AnyPath: TypeAlias = "Path | epath.Path"

COMMITTED = "commit_success.txt"  # marker of complete checkpoints in a bucket

_copies: dict[str, LocalCopy] = {}  # local copies of runs in a bucket, by address


def resolve_path(place: str) -> AnyPath:
    """Return the path of a local folder or of gs://BUCKET/PATH.

    Raises:
        UserError: the address has another scheme, or gcsfs is not installed.
    """
    try:
        place.encode()
    except UnicodeEncodeError:
        raise UserError(f"{place!a}: the folder name must be valid UTF-8") from None
    if not place:
        raise UserError("the name of a folder or file is empty")
    if "://" not in place:
        return Path(place)
    from lm.storage.bucket import bucket_path

    return bucket_path(place)


def open_run_folder(place: str) -> Path:
    """Return the local folder, or a local copy of gs://… without its checkpoints."""
    address = resolve_path(place)
    if isinstance(address, Path):
        return address
    if str(address) not in _copies:
        from lm.storage.bucket import download

        _copies[str(address)] = download(address)
    return _copies[str(address)].folder


def upload_changes() -> None:
    """Upload files of the local copies that changed since the last upload."""
    for copy in _copies.values():
        copy.upload()


@contextmanager
def local_copies() -> Iterator[None]:
    """Upload changes on exit unless an exception was raised; remove the local copies."""
    try:
        yield
        upload_changes()
    finally:
        for copy in _copies.values():
            shutil.rmtree(copy.folder.parent, ignore_errors=True)
        _copies.clear()


def storage_path(path: AnyPath) -> AnyPath:
    """Return where a path is stored: absolute, or in the bucket if it is inside a local copy."""
    if isinstance(path, Path):
        path = path.absolute()
        for copy in _copies.values():
            if path.is_relative_to(copy.folder):
                return copy.address / path.relative_to(copy.folder)
    return path


def is_step(name: str) -> bool:
    """Return whether a folder name is a step number, as for checkpoints."""
    return name.isascii() and name.isdigit()


def is_committed(checkpoint: AnyPath) -> bool:
    """Return whether a checkpoint is complete.

    Orbax renames a local folder once it is complete; in a bucket it writes a marker file.
    """
    return isinstance(checkpoint, Path) or (checkpoint / COMMITTED).exists()


def write_atomically(file: Path, text: str) -> None:
    """Replace a file atomically: readers and crashes see the old or the new text."""
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


T = TypeVar("T")


class DamagedFolder(Exception):
    """Error of a complete folder with unexpected content."""


def plain_place(place: str) -> str:
    """Convert file:///PATH to a path; return paths and other URLs unchanged."""
    return urllib.parse.unquote(place[7:]) if place.startswith("file:///") else place


def chosen_cache(data: Any) -> str:
    """Return `data.cache_directory`, LM_CACHE_DIR or ~/.cache/lm; a bucket is given as a URL."""
    return plain_place(data.cache_directory or os.environ.get("LM_CACHE_DIR") or "~/.cache/lm")


def cache_directory(data: Any) -> Path:
    """Return the local cache folder: the first of these places that is not a URL."""
    places = data.cache_directory, os.environ.get("LM_CACHE_DIR"), "~/.cache/lm"
    chosen = next(p for p in map(plain_place, filter(None, places)) if "://" not in p)
    try:
        return Path(chosen).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{chosen}: {error}: set HOME, LM_CACHE_DIR or --config.data.cache_directory"
        ) from error


def open_or_build(folder: Path, read: Callable[[Path], T], build: Callable[[Path], None]) -> T:
    """Read a folder of the cache; build it first if it does not exist.

    One process builds in a sibling folder, which is renamed when complete; the others wait for its
    lock. Remains of a killed build are removed, and a damaged folder is rebuilt with a message on
    stderr.

    Args:
        folder: cache folder.
        read: returns its content; raises DamagedFolder if that is not as expected.
        build: fills an empty folder.

    Returns:
        Result of `read`.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    try:
        if folder.exists():
            return read(folder)
    except DamagedFolder:
        pass  # read again under the lock
    with _disk_errors(folder), lock(folder.with_name(f"{folder.name}.lock")):
        if folder.exists():
            try:
                return read(folder)
            except DamagedFolder as damage:
                _warn(f"{folder} is damaged ({damage}): building it again")
                shutil.rmtree(folder)
        partial = folder.with_name(folder.name + ".partial")
        if partial.exists():
            _warn(f"a build of {folder} was interrupted: building it again")
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
    """Write a file and sync it to disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def lock(file: Path, problem: str = "", seconds: float = 2.0) -> Iterator[int]:
    """Hold an exclusive file lock, creating the file, and yield its descriptor.

    The lock of a killed process is released by the system. If the file system does not support
    locks, a line on stderr says so.

    Args:
        file: lock file.
        problem: error message if another process holds the lock; "": wait for it.
        seconds: how long to retry before that error, since a killed process may still be exiting.

    Raises:
        UserError: another process holds the lock.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT)
    deadline = time.monotonic() + seconds
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if problem else 0))
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(problem) from None
                time.sleep(0.1)
            except OSError as error:
                _warn(f"{file}: no file locks ({error.strerror}): use it in one process only")
                break
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def run_lock(workdir: AnyPath) -> Iterator[None]:
    """Hold the lock of a workdir, creating it, while its run trains.

    Raises:
        UserError: another process trains there, or the workdir is not writable.
    """
    problem = f"another process trains in {workdir}: wait for it, stop it, or use another --workdir"
    if not isinstance(workdir, Path):
        from lm.storage.bucket import lease

        with lease(workdir, problem):
            yield
        return
    is_new = not workdir.exists()
    with ExitStack() as held:
        try:
            held.enter_context(lock(workdir / ".lock", problem))
        except OSError as error:
            raise UserError(f"cannot write to --workdir {workdir}: {error.strerror}") from None
        try:
            yield
        finally:
            if is_new and os.listdir(workdir) == [".lock"]:
                shutil.rmtree(workdir)  # created by a start that failed


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Convert errors of a full, read-only or missing disk to UserError."""
    advice = "set LM_CACHE_DIR or --config.data.cache_directory to another disk"
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk is full while writing {folder}: {advice}") from error
        reason = error.strerror or error
        raise UserError(f"{folder} cannot be written ({reason}): {advice}") from error


def _flush(folder: Path) -> None:
    """Sync the entries of a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _warn(message: str) -> None:
    print(message, file=sys.stderr)


# --- JSON of runs, corpora and other programs
#
# A file may be empty, truncated, full of zeros, not UTF-8, of another type, nested a million levels
# deep or contain a number of 5,000 digits: each raises a one-line `UserError` that names the file.

_NAMES = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number"}
_NAMES |= {bool: "true or false", type(None): "null"}


def parse_json(
    text: str | bytes, place: object, kind: type = dict, *, whole_characters: bool = False
) -> Any:
    r"""Parse JSON text.

    Args:
        text: the text; bytes are UTF-8, with or without a byte order mark.
        place: its file or line, for the error message.
        kind: required type of the value.
        whole_characters: reject lone surrogates, such as "\ud83d", which UTF-8 cannot encode.

    Raises:
        UserError: the text is damaged, or its value has another type.
    """
    try:
        value = json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
        if whole_characters:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        problem = "nested too deeply"
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 at byte {error.start}"
    except UnicodeEncodeError:
        problem = "half of a surrogate pair"
    except ValueError as error:
        problem = str(error).partition(";")[0] if text.strip() else "empty"
    else:
        if isinstance(value, kind):
            return value
        problem = f"{_NAMES[type(value)]} instead of {_NAMES[kind]}"
    raise UserError(f"{place}: damaged JSON ({problem})")


def read_json(file: Any, kind: type = dict, *, whole_characters: bool = False) -> Any:
    """Read a JSON file, local or in a bucket.

    Raises:
        FileNotFoundError: the file does not exist.
        UserError: it is damaged, unreadable, or its value is not of type `kind`.
    """
    try:
        content = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(str(file)) from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    return parse_json(content, file, kind, whole_characters=whole_characters)
