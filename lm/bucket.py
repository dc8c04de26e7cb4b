"""Runs in a bucket (gs://BUCKET/PATH): a local copy of their small files."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from etils import epath

from lm.errors import UserError, missing_package

_SCHEME = "gs://"
_NOT_COPIED = {"checkpoints", "damaged", "tensorboard"}


@dataclass
class LocalCopy:
    """Local copy of a run in a bucket.

    Attributes:
        address: folder in the bucket.
        folder: the copy.
        uploaded: size and modification time of every file when it was last uploaded.
    """

    address: epath.Path
    folder: Path
    uploaded: dict[Path, tuple[int, int]] = field(default_factory=dict)

    def upload(self) -> None:
        """Upload the files that changed since the last upload."""
        now = _file_states(self.folder)
        for file, state in now.items():
            if self.uploaded.get(file) != state:
                content = (self.folder / file).read_bytes()
                with _storage_errors(self.address):
                    (self.address / file).write_bytes(content)
        self.uploaded = now


def bucket_path(place: str) -> epath.Path:
    """Return the path of gs://BUCKET/PATH.

    Raises:
        UserError: the address has another scheme, or gcsfs is not installed.
    """
    if not place.startswith(_SCHEME):
        raise UserError(f"{place}: expected a local folder or gs://BUCKET/PATH")
    if importlib.util.find_spec("gcsfs") is None:
        raise missing_package(place, "gcsfs", "gcs")
    import fsspec

    logging.getLogger("gcsfs").setLevel(logging.ERROR)  # it warns about every missing permission
    # Files that other processes wrote must be visible.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return epath.Path(place.rstrip("/"))


def download(address: epath.Path) -> LocalCopy:
    """Copy a run from a bucket, without what is written there directly."""
    copy = LocalCopy(address, Path(tempfile.mkdtemp(prefix="lm-")) / address.name)
    copy.folder.mkdir()
    with _storage_errors(address):
        _download(address, copy.folder)
    copy.uploaded = _file_states(copy.folder)
    return copy


@contextmanager
def _storage_errors(address: epath.Path) -> Iterator[None]:
    """Convert non-retriable storage errors to UserError: no such bucket, no permission."""
    from gcsfs.retry import HttpError, is_retriable

    try:
        yield
    except (OSError, HttpError) as error:
        if is_retriable(error):
            raise
        problem = " ".join(str(error).split())
        raise UserError(f"{address}: {type(error).__name__}: {problem}") from error


def _download(source: epath.Path, target: Path) -> None:
    """Copy a folder of a bucket, without what is written there directly."""
    if not source.is_dir():
        return
    for path in source.iterdir():
        if path.name in _NOT_COPIED:
            continue
        if path.is_dir():
            (target / path.name).mkdir()
            _download(path, target / path.name)
        else:
            (target / path.name).write_bytes(path.read_bytes())


def _file_states(folder: Path) -> dict[Path, tuple[int, int]]:
    """Return size and modification time of every file, by relative path."""
    files = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path.relative_to(folder): (s.st_size, s.st_mtime_ns) for path, s in files.items()}
