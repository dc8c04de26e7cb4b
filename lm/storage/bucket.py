"""Runs in a bucket (gs://BUCKET/PATH): a local copy of their small files, and a lease."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from etils import epath

from lm.errors import UserError, missing_package
from lm.storage import parse_json

_SCHEME = "gs://"
_NOT_COPIED = {"checkpoints", "damaged", "tensorboard", ".lock"}
_RENEW_SECONDS = 20.0  # between renewals of a lease
_DEAD_AFTER = 3  # missed renewals after which a lease may be taken over


@dataclass
class LocalCopy:
    """Local copy of a run in a bucket.

    Attributes:
        address: folder in the bucket.
        folder: local folder.
        uploaded: size and modification time of every file at its last upload.
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

    logging.getLogger("gcsfs").setLevel(logging.ERROR)  # it warns about each missing permission
    # Files that other processes wrote must be visible.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return epath.Path(place.rstrip("/"))


def download(address: epath.Path) -> LocalCopy:
    """Download a run from a bucket, except for what is written there directly."""
    copy = LocalCopy(address, Path(tempfile.mkdtemp(prefix="lm-")) / address.name)
    copy.folder.mkdir()
    with _storage_errors(address):
        _download(address, copy.folder)
    copy.uploaded = _file_states(copy.folder)
    return copy


@contextmanager
def _storage_errors(address: epath.Path) -> Iterator[None]:
    """Convert non-retriable storage errors to UserError: missing bucket, missing permission."""
    from gcsfs.retry import HttpError, is_retriable

    try:
        yield
    except (OSError, HttpError) as error:
        if is_retriable(error):
            raise
        problem = " ".join(str(error).split())
        raise UserError(f"{address}: {type(error).__name__}: {problem}") from error


def _download(source: epath.Path, target: Path) -> None:
    """Download a folder of a bucket, except for what is written there directly."""
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


# --- lease


@contextmanager
def lease(
    address: epath.Path, problem: str, end: Callable[[int], None] = os._exit
) -> Iterator[None]:
    """Hold the lease of a folder: its object .lock, which a thread rewrites periodically.

    Every write is conditional on the generation that it replaces, so only one of two concurrent
    writers succeeds. The lease of a killed process is taken over: at once if that process ran on
    this machine and is gone, otherwise if it has not been renewed for a minute.

    Args:
        address: folder in the bucket.
        problem: error message if another process holds the lease.
        end: called with 1, after printing a line, if another process took over this lease.

    Raises:
        UserError: another process holds the lease, or the bucket is not writable.
    """
    own = _Lease(address)
    with _storage_errors(address):
        own.acquire(problem)
    released = threading.Event()

    def renew() -> None:
        while not released.wait(_RENEW_SECONDS):
            try:
                own.write()
            except FileExistsError:
                line = f"error: another process now trains in {address}: this one exits"
                print(line, file=sys.stderr, flush=True)
                end(1)
                return
            except Exception:  # a network error; the next renewal may succeed
                continue

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        released.set()
        thread.join()
        own.release()


class _Lease:
    """Lock object of a bucket, owned by one process."""

    def __init__(self, address: epath.Path):
        import fsspec

        self._address, self._fs = address, fsspec.filesystem("gcs")
        self._bucket, _, folder = str(address).removeprefix(_SCHEME).partition("/")
        self._key = f"{folder}/.lock".lstrip("/")
        self._content = {
            "owner": uuid.uuid4().hex,
            "machine": machine_name(),
            "process": os.getpid(),
        }
        self._generation = "0"  # generation of a missing object

    def acquire(self, problem: str) -> None:
        self._generation, holder = self._read()
        if self._generation != "0" and not has_ended(holder):
            self._wait(problem)
        try:
            self.write()
        except FileExistsError:
            raise UserError(problem) from None

    def _wait(self, problem: str) -> None:
        """Wait until the holder has released its lease or stopped renewing it."""
        seconds = _DEAD_AFTER * _RENEW_SECONDS
        print(
            f"{self._address} is in use, or its last process was killed: watching it for "
            f"{seconds:g} s",
            file=sys.stderr,
            flush=True,
        )
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(_RENEW_SECONDS / 10)
            generation, _ = self._read()
            if generation not in (self._generation, "0"):
                raise UserError(problem)
            self._generation = generation
            if generation == "0":
                return

    def _read(self) -> tuple[str, dict]:
        """Return the object's generation ("0" if missing) and its content."""
        try:
            path = "b/{}/o/{}"
            found = self._fs.call("GET", path, self._bucket, self._key, json_out=True)
            _, content = self._fs.call("GET", path, self._bucket, self._key, alt="media")
        except FileNotFoundError:
            return "0", {}
        with suppress(UserError):  # written by another program
            return found["generation"], parse_json(content, self._key)
        return found["generation"], {}

    def write(self) -> None:
        """Replace the known generation of the object.

        Raises:
            FileExistsError: another process has written the object.
        """
        try:
            written = self._fs.call(
                "POST",
                f"{self._fs.base.replace('/storage/', '/upload/storage/')}b/{self._bucket}/o",
                uploadType="media",
                name=self._key,
                ifGenerationMatch=self._generation,
                data=json.dumps({**self._content, "time": time.time()}).encode(),
                json_out=True,
            )
        except FileExistsError:
            generation, content = self._read()
            if content.get("owner") != self._content["owner"]:
                raise
            self._generation = generation  # written by an earlier attempt whose reply was lost
        else:
            self._generation = written["generation"]

    def release(self) -> None:
        path, generation = "b/{}/o/{}", self._generation
        with suppress(Exception):  # the lease expires anyway
            self._fs.call("DELETE", path, self._bucket, self._key, ifGenerationMatch=generation)


def machine_name() -> str:
    """Return an id of this machine's boot and pid namespace; "" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def has_ended(holder: dict) -> bool:
    """Return whether the holder was a process of this machine that no longer exists."""
    process = holder.get("process")
    here = machine_name() and holder.get("machine") == machine_name()
    return bool(here and isinstance(process, int) and not Path(f"/proc/{process}").exists())
