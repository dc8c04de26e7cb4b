"""Runs that lie in a bucket, gs://BUCKET/PATH.

Checkpoints go straight there. On the small files of a run (configuration, tokenizer, metrics,
reports) a process works in a copy of its own, a temporary folder: `open_folder` fetches it, `push`
sends what changed since. So everything else sees folders of this machine.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

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
