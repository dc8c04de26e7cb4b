"""Detection and removal of cache folders that are no longer needed.

Only folders whose name is a cache key and whose files are all cache files are considered. All
others, and links, are left alone.
"""

from __future__ import annotations

import json
import re
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.data.sharded_store import store_place
from lm.data.verification import sources_of
from lm.errors import UserError
from lm.storage import cache_directory, lock, read_json
from lm.storage.bucket import has_ended, machine_name

RECENT_SECONDS = 3600.0
_PLACES = ("stores", "records", "tokenizers")
_NAME = re.compile(r"[0-9a-f]{32}(\.shards|\.counts|\.partial)?")
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.(.+)\.tmp")
# Names of files in such folders.
_SHARDS = re.compile(r"\d{5,}\.(shard|digest)(\.claim)?")
_COUNTS = re.compile(r"\d{5,}\.(json|digest)(\.claim)?")
_ANY = re.compile(r"[^.].*")


@dataclass(frozen=True)
class Unneeded:
    """Cache folder that is no longer needed.

    Attributes:
        folder: the folder.
        reason: why it is not needed.
        names: pattern of file names that the cache writes there.
        files: its files.
        n_bytes: total file size in bytes.
        age: seconds since its last change.
        kept: why it must not be removed; "" if it may be.
    """

    folder: Path
    reason: str
    names: re.Pattern[str]
    files: tuple[Path, ...]
    n_bytes: int
    age: float
    kept: str

    def remove(self) -> None:
        """Remove the folder, after checking it again.

        Raises:
            UserError: it has changed, or cannot be removed.
        """
        try:
            with _no_build(self.folder):
                now = _look_inside(self.folder, self.reason, self.names)
                if now.kept:
                    raise UserError(now.kept)
                for file in (*now.files, *self.folder.parent.glob(f"by_name/*.{self.folder.name}")):
                    file.unlink()
                self.folder.rmdir()
        except UserError as error:
            raise UserError(f"{self.folder} is not removed: {error}") from error
        except OSError as error:
            problem = f"{self.folder} cannot be removed ({error.strerror})"
            raise UserError(problem) from error


def find_unneeded(configs: Sequence[Any], columns: Sequence[tuple[str, ...]]) -> list[Unneeded]:
    """Return the unneeded folders of a cache, in order of removal.

    Args:
        configs: sections `data` of configurations that share a cache.
        columns: record columns for each configuration, () for documents; stores of earlier versions
            of their sources are not needed. (): ignore this reason.

    Raises:
        UserError: the cache is in a bucket, or a source cannot be opened.
    """
    caches = {store_place(data): cache_directory(data) for data in configs}
    for place in caches:
        if "://" in place:
            raise UserError(
                f"{place}: buckets have no locks, so a folder in use could be removed; while no "
                "build runs, remove its *.shards and *.counts with the bucket's own tool"
            )
    if len(caches) > 1:
        raise UserError(f"the configurations have several caches: {', '.join(sorted(caches))}")
    digests: dict[str, set[str]] = {}
    for data, names in zip(configs, columns, strict=False):
        for source in sources_of(data, names):
            digests.setdefault(source.name, set()).add(source.digest)
    return list(_find(next(iter(caches.values())), digests))


def _look(folder: Path, reason: str, names: re.Pattern[str], kept: str = "") -> Unneeded:
    """Describe a folder and whether it may be removed; `kept` is a known reason against it."""
    try:
        with _no_build(folder):
            pass
    except UserError as error:
        kept = kept or str(error)
    except OSError as error:
        kept = kept or f"its lock cannot be opened ({error.strerror})"
    return _look_inside(folder, reason, names, kept)


def _find(cache: Path, digests: dict[str, set[str]]) -> Iterator[Unneeded]:
    needed, unknown = set[str](), ""
    folders = sorted(folder for parent in _PLACES for folder in cache.glob(f"{parent}/*"))
    for file in (folder / "manifest.json" for folder in folders):
        try:
            manifest = read_json(file)
        except FileNotFoundError:
            continue
        except UserError:
            unknown = unknown or f"{file} cannot be read, and may name it"
            continue
        name, digest = (str(manifest.get(key)) for key in ("source", "source_digest"))
        if digest not in digests.get(name, {digest}):
            found = _look(
                file.parent, f"{name} has changed contents or settings", _files_of(manifest)
            )
            yield found
            if not found.kept:
                continue
        needed.add(str(manifest.get("folder")))
    for folder in sorted(cache.glob("stores/*.shards")):
        if folder.name not in needed:
            yield _look(folder, "no manifest refers to it", _SHARDS, unknown)
    for folder in sorted(cache.glob("stores/*.counts")):
        yield _look(folder, "document counts of a finished build", _COUNTS)
    for parent in _PLACES:
        for folder in sorted(cache.glob(f"{parent}/*.partial")):
            yield _look(folder, "an interrupted build", _ANY)


def _files_of(manifest: dict[str, Any]) -> re.Pattern[str]:
    checksums = manifest.get("checksums")
    names = ["manifest.json", *(checksums if isinstance(checksums, dict) else ())]
    return re.compile("|".join(map(re.escape, names)))


def _look_inside(folder: Path, reason: str, names: re.Pattern[str], kept: str = "") -> Unneeded:
    """Like `_look`, but without the lock of the processes that build the folder."""
    files: list[Path] = []
    n_bytes, changed, problem = 0, 0.0, _foreign(folder)
    try:
        changed = folder.lstat().st_mtime
        for file in () if problem else sorted(folder.iterdir()):
            status = file.lstat()
            n_bytes, changed = n_bytes + status.st_size, max(changed, status.st_mtime)
            temporary = _TEMPORARY.fullmatch(file.name)
            is_own = names.fullmatch(temporary[1] if temporary else file.name)
            if not (is_own and stat.S_ISREG(status.st_mode)):
                problem = f"{file.name} in it was not written by the cache"
            files.append(file)
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    age = time.time() - changed
    recent = "changed within an hour" if age < RECENT_SECONDS else ""
    kept = problem or kept or recent or _claimed(folder)
    # Remove the manifest first: a partly removed store is then no store.
    files.sort(key=lambda file: file.name != "manifest.json")
    return Unneeded(folder, reason, names, tuple(files), n_bytes, age, kept)


def _foreign(folder: Path) -> str:
    """Return why the path of a folder is not one of the cache's, or ""."""
    if folder.is_symlink() or folder.parent.is_symlink():
        return "a link"
    is_own = folder.is_dir() and bool(_NAME.fullmatch(folder.name))
    if folder.suffix == ".partial":
        is_own = is_own and _lock_of(folder).is_file() and not _lock_of(folder).is_symlink()
    return "" if is_own else "not written by the cache"


def _lock_of(folder: Path) -> Path:
    return folder.with_suffix(".lock")


@contextmanager
def _no_build(folder: Path) -> Iterator[None]:
    """Hold the build lock of a folder, if it has one; UserError if it is being built."""
    with ExitStack() as held:
        if not _foreign(folder) and _lock_of(folder).is_file():
            held.enter_context(lock(_lock_of(folder), "a process is building it", seconds=-1.0))
        yield


def _claimed(folder: Path) -> str:
    """Describe an active build of a folder, or ""."""
    for file in folder.glob("*.claim"):
        try:
            claim = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        here = isinstance(claim, dict) and claim.get("machine") == machine_name() != ""
        if here and not has_ended(claim):
            return f"process {claim.get('process')} builds there"
    return ""
