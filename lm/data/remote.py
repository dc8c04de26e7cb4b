"""Files in buckets and on servers, by URL: streamed like local files, never copied whole.

Reading resumes after network failures, and fails if a file is shorter than its listing says or
changes meanwhile. Buckets are accessed through fsspec, which also reads options from environment
variables such as FSSPEC_S3_ANON=true.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from lm.errors import UserError, missing_package

if TYPE_CHECKING:  # imported at run time only when a URL is read
    from upath import UPath

T = TypeVar("T")


class _Scheme(NamedTuple):
    package: str
    extra: str
    login: str = ""  # command to obtain credentials


_SCHEMES = {
    "gs": _Scheme("gcsfs", "gcs", "`gcloud auth application-default login`"),
    "s3": _Scheme("s3fs", "s3", "set AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    "hf": _Scheme("huggingface_hub", "hf", "`hf auth login`, or set HF_TOKEN"),
    "https": _Scheme("aiohttp", "http"),
    "http": _Scheme("aiohttp", "http"),
}
_BLOCK = 2**23  # bytes per request
_TRIES = 5
_TRIES_GS = 2  # gcsfs retries each request six times itself, for half a minute
_FIRST_DELAY = 1.0  # seconds; doubled with each retry
# Metadata that identifies a file version, most reliable first.
_VERSIONS = (
    *("generation", "ETag", "etag", "blob_id", "md5Hash", "Content-MD5"),
    *("Last-Modified", "LastModified", "updated", "mtime"),
)

_listed: dict[str, dict[str, Any]] = {}  # file metadata by URL


def is_url(text: str) -> bool:
    """Return whether a text is a URL rather than a local path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text) is not None


def remote_path(url: str) -> UPath:
    """Return the path object of a URL.

    Raises:
        UserError: its scheme is unknown, or the package for it is not installed.
    """
    name = url.partition("://")[0]
    if name not in _SCHEMES:
        known = ", ".join(f"{known}://" for known in _SCHEMES)
        raise UserError(f"{url}: unknown URL scheme (known: {known})")
    scheme = _SCHEMES[name]
    for package in (scheme.package, "upath"):
        if importlib.util.find_spec(package) is None:
            raise missing_package(url, package.replace("upath", "universal-pathlib"), scheme.extra)
    from upath import UPath

    # Files that other processes wrote must be visible.
    return UPath(url, use_listings_cache=False)


def find_remote_files(path: UPath) -> tuple[UPath, ...]:
    """Return the sorted files of a URL or glob; () if there are none.

    Raises:
        UserError: the URL is a folder, or the bucket does not exist or cannot be read.
    """
    from upath import UPath

    fs, key, url = path.fs, path.path, str(path)
    with storage_errors(url):
        described = _retried(url, lambda: _describe(fs, key))
        if described is not None and described["type"] == "directory":
            raise UserError(f"{url}: is a folder: name its files, such as {url.rstrip('/')}/*")
        if described:
            found = {url: described}
        else:
            matches: dict[str, Any] = {}
            with suppress(FileNotFoundError):
                if _is_glob(url):
                    matches = _retried(url, lambda: fs.glob(key, detail=True))
            files = {k: info for k, info in matches.items() if info["type"] == "file"}
            found = {fs.unstrip_protocol(name): info for name, info in files.items()}
        bucket = key.partition("/")[0]
        if not found and url.startswith(("gs:", "s3:")) and not fs.exists(bucket):
            raise UserError(f"{url}: bucket {bucket!r} does not exist, or cannot be listed")
    # The list of links from a server has neither sizes nor versions.
    _listed.update({name: info for name, info in found.items() if _version(info)})
    return tuple(UPath(name, use_listings_cache=False) for name in sorted(found))


def remote_is_folder(path: UPath) -> bool:
    """Return whether a URL is a folder."""
    with storage_errors(str(path)):
        described = _retried(str(path), lambda: _describe(path.fs, path.path))
    return described is not None and described["type"] == "directory"


def remote_exists(path: UPath) -> bool:
    """Return whether there is a file or folder at a URL."""
    with storage_errors(str(path)):
        return _retried(str(path), lambda: _describe(path.fs, path.path)) is not None


def _is_glob(url: str) -> bool:
    return bool(set(url) & ({"*", "["} if url.startswith("http") else {"*", "[", "?"}))


def _describe(fs: Any, key: str) -> dict[str, Any] | None:
    """Return the current metadata of a file or folder; None if it does not exist."""
    try:
        fs.invalidate_cache(key)
        return fs.info(key)
    except FileNotFoundError as error:
        cause = error.__cause__  # fsspec reports every HTTP failure like this
        if key.startswith("http") and cause is not None and _status(cause) not in (404, 410):
            raise cause from None
        return None


def remote_state(path: UPath) -> tuple[int, int, int, int]:
    """Return the state of a file from its listing: version, 0, size, 0.

    The version takes the place of a local file's modification time. If the store gives no version,
    a time in the future is used, so that the content is always read.
    """
    info = _description(path)
    version = _version(info)
    digest = int(hashlib.sha256(version.encode()).hexdigest(), 16) % 10**17
    return digest if version else 2**62, 0, info.get("size") or 0, 0


def _description(path: UPath) -> dict[str, Any]:
    url = str(path)
    if url not in _listed:
        with storage_errors(url):
            described = _retried(url, lambda: _describe(path.fs, path.path))
        if described is None:
            raise UserError(f"{url}: does not exist")
        _listed[url] = described
    return _listed[url]


def _version(info: dict[str, Any]) -> str:
    name = next((name for name in _VERSIONS if info.get(name)), "")
    return f"{name} {info[name]}" if name else ""


def require_listed(path: UPath) -> None:
    """Raise UserError if a file is no longer the listed version."""
    url, listed = str(path), _description(path)
    with storage_errors(url):
        now = _retried(url, lambda: _describe(path.fs, path.path))
    if now is None:
        raise UserError(f"{url}: was removed while it was read")
    if (_version(now), now.get("size")) != (_version(listed), listed.get("size")):
        raise UserError(f"{url}: changed while it was read: start again when it is complete")


def open_remote(path: UPath) -> io.BufferedReader:
    """Open a file, in its listed version, for reading.

    Raises:
        UserError: the file cannot be read, has changed or is truncated; `read` raises it too.
    """
    return io.BufferedReader(RemoteFile(path), 2**20)


class RemoteFile(io.RawIOBase):
    """Bytes of a file by URL; resumes after failures (call `require_listed` at the end)."""

    def __init__(self, path: UPath):
        self._path, self._url = path, str(path)
        self._size = _description(path).get("size")
        self._file: Any = None
        self._position = 0
        self._block = _BLOCK  # 0: stream, for servers without range requests

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._size is not None

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0, /) -> int:
        starts = (0, self._position, self._size or 0)
        self._position = max(starts[whence] + offset, 0)
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        if self._size is not None and self._position >= self._size:
            return 0
        with storage_errors(self._url):
            content = _retried(self._url, lambda: self._read(len(buffer)))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def close(self) -> None:
        self._drop()
        super().close()

    def _read(self, size: int) -> bytes:
        try:
            if self._file is None:
                self._file = self._path.fs.open(
                    self._path.path, "rb", block_size=self._block, cache_type="readahead"
                )
            self._go_to_position()
            content = self._file.read(min(size, _BLOCK))
            if not content and self._size is not None:
                raise EOFError
            return content
        except Exception as error:
            self._drop()
            if isinstance(error, ValueError) and self._block and self._url.startswith("http"):
                self._block = 0
                return self._read(size)
            require_listed(self._path)
            if isinstance(error, EOFError):
                raise _EndsEarly(f"ended after {self._position} of {self._size} bytes") from error
            raise

    def _go_to_position(self) -> None:
        """Seek the open file to the position; without range requests, read up to it."""
        place = self._file.tell()
        if place == self._position:
            return
        try:
            self._file.seek(self._position)
        except ValueError as error:
            if place > self._position:
                raise UserError(
                    f"{self._url}: the server does not support range requests, which this "
                    "format needs: download the file first"
                ) from error
            while place < self._position:
                skipped = self._file.read(min(_BLOCK, self._position - place))
                if not skipped:
                    raise EOFError from error
                place += len(skipped)

    def _drop(self) -> None:
        if self._file is not None:
            with suppress(Exception):
                self._file.close()
            self._file = None


class _EndsEarly(OSError):
    """Error of a file that returns fewer bytes than its listing says."""


@contextmanager
def storage_errors(url: str, scheme: str = "") -> Iterator[None]:
    """Convert any error of a store, network or library into a one-line UserError.

    Args:
        url: URL, or name of a source.
        scheme: store of a named source; "": that of the URL.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        problem = " ".join(str(error).split())[:300]
        login = _SCHEMES[scheme or url.partition("://")[0]].login
        advice = f": log in ({login})" if login and _lacks_permission(error) else ""
        name = "" if isinstance(error, _EndsEarly) else f"{type(error).__name__}: "
        raise UserError(f"{url}: cannot be read ({name}{problem}){advice}") from error


def _lacks_permission(error: Exception) -> bool:
    named = "credential" in f"{type(error).__name__} {error}".lower()
    return named or isinstance(error, PermissionError) or _status(error) in (401, 403)


def _status(error: BaseException) -> int:
    """Return the HTTP status of an error; 0 if it has none."""
    found = getattr(error, "status", None) or getattr(error, "code", None)
    found = found or getattr(getattr(error, "response", None), "status_code", None)
    return int(str(found)) if str(found).isdigit() else 0


def _retried(url: str, action: Callable[[], T]) -> T:
    """Run an action, and retry after transient errors."""
    tries = _TRIES_GS if url.startswith("gs:") else _TRIES
    for number in range(tries):
        try:
            return action()
        except Exception as error:
            if number == tries - 1 or not _may_pass(error):
                raise
            time.sleep(_FIRST_DELAY * 2**number * random.uniform(0.5, 1.5))
    raise AssertionError(url)


def _may_pass(error: Exception) -> bool:
    final = UserError | FileNotFoundError | NotADirectoryError | IsADirectoryError | ImportError
    if isinstance(error, final) or _lacks_permission(error):
        return False
    status = _status(error)
    return not 400 <= status < 500 or status in (408, 429)
