"""Folders shared by processes on several hosts, on disk or in a bucket (any fsspec URL).

Files appear atomically.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lm.errors import UserError
from lm.storage import plain_place


class SharedFolder(ABC):
    """Flat folder of files, created when the first file is written.

    Attributes:
        place: path or URL, for messages.
    """

    place: str

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Return the size of each file by name; {} if the folder does not exist."""

    @abstractmethod
    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Read bytes of a file, by default all.

        Raises:
            FileNotFoundError: the file does not exist.
        """

    def read_each(self, names: Sequence[str], starts: Sequence[int] = ()) -> list[bytes]:
        """Read several files, each from a start offset."""
        starts = starts or [0] * len(names)
        return [self.read(name, start) for name, start in zip(names, starts, strict=True)]

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Write or replace a file."""

    @abstractmethod
    def create(self, name: str, content: bytes) -> bool:
        """Create a file unless it exists; return whether it was created."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file if it exists."""

    @abstractmethod
    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yield a new local path, whose content becomes the file `name` on exit."""


def open_shared_folder(place: str | Path, *names: str) -> SharedFolder:
    """Open a folder below a path or URL.

    Raises:
        UserError: the URL scheme is unknown, or its package is not installed.
    """
    place = plain_place(str(place))
    if "://" not in place:
        return _DiskFolder(Path(place, *names))
    return _RemoteFolder("/".join((place.rstrip("/"), *names)))


class _DiskFolder(SharedFolder):
    def __init__(self, folder: Path):
        self._folder, self.place = folder, str(folder)

    def __repr__(self) -> str:
        return f"_DiskFolder({self.place!r})"

    def sizes(self) -> dict[str, int]:
        try:
            with os.scandir(self._folder) as entries:
                found = [entry for entry in entries if not entry.name.startswith(".")]
        except FileNotFoundError:
            return {}
        sizes = {}
        for entry in found:
            with suppress(FileNotFoundError):  # removed by another process
                sizes[entry.name] = entry.stat().st_size
        return sizes

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        with open(self._folder / name, "rb") as file:
            file.seek(start)
            return file.read() if stop is None else file.read(stop - start)

    def write(self, name: str, content: bytes) -> None:
        with self.writing(name) as path:
            path.write_bytes(content)

    def create(self, name: str, content: bytes) -> bool:
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._temporary(name)
        temporary.write_bytes(content)
        try:
            os.link(temporary, self._folder / name)  # atomic, and fails if it exists
        except FileExistsError:
            return False
        except OSError:  # the file system has no hard links
            try:
                with open(self._folder / name, "xb") as file:
                    file.write(content)
            except FileExistsError:
                return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def remove(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._temporary(name)
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(self._folder / name)
        except FileNotFoundError:
            if not (self._folder / name).exists():  # otherwise another process wrote it
                raise
        finally:
            temporary.unlink(missing_ok=True)
        for left_over in self._folder.glob(f".*.{name}.tmp"):  # from killed processes
            left_over.unlink(missing_ok=True)

    def _temporary(self, name: str) -> Path:
        return self._folder / f".{uuid.uuid4().hex}.{name}.tmp"


class _RemoteFolder(SharedFolder):
    def __init__(self, url: str):
        self.place = url
        self._open()

    def _open(self) -> None:
        import fsspec

        logging.getLogger("gcsfs").setLevel(logging.ERROR)  # it warns about missing permissions
        try:
            options = {} if self.place.startswith("memory:") else {"use_listings_cache": False}
            self._fs, self._path = fsspec.core.url_to_fs(self.place, **options)
        except (ImportError, ValueError, OSError) as error:
            raise UserError(f"{self.place}: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {"place": self.place}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.place = state["place"]
        self._open()

    def __repr__(self) -> str:
        return f"_RemoteFolder({self.place!r})"

    @contextmanager
    def _errors(self, *expected: type[Exception]) -> Iterator[None]:
        """Convert storage errors to UserError, except those that the caller expects."""
        try:
            yield
        except Exception as error:  # each package has its own types
            if isinstance(error, (UserError, *expected)):
                raise
            problem = " ".join(str(error).split())
            raise UserError(f"{self.place}: {type(error).__name__}: {problem}") from error

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"

    def sizes(self) -> dict[str, int]:
        try:
            with self._errors(FileNotFoundError):
                found = self._fs.ls(self._path, detail=True)
        except FileNotFoundError:
            return {}
        files = {row["name"].rpartition("/")[2]: row for row in found if row["type"] == "file"}
        return {name: row["size"] for name, row in files.items() if name}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        with self._errors(FileNotFoundError):
            return self._fs.cat_file(self._at(name), start=start or None, end=stop)

    def read_each(self, names: Sequence[str], starts: Sequence[int] = ()) -> list[bytes]:
        paths = [self._at(name) for name in names]
        with self._errors():
            return self._fs.cat_ranges(paths, list(starts) or 0, None, on_error="raise")

    def write(self, name: str, content: bytes) -> None:
        with self._errors():
            self._fs.pipe_file(self._at(name), content)

    def create(self, name: str, content: bytes) -> bool:
        try:
            with self._errors(FileExistsError):
                self._fs.pipe_file(self._at(name), content, mode="create")
        except FileExistsError:
            return False
        return True

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError), self._errors(FileNotFoundError):
            self._fs.rm_file(self._at(name))

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        folder = Path(tempfile.mkdtemp(prefix="lm-"))
        try:
            yield folder / name
            with self._errors():
                self._fs.put_file(str(folder / name), self._at(name))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
