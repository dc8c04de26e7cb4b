"""Cooperative builds: processes on any hosts build a set of files, each taking unclaimed ones.

A process claims a file with another one next to it, NAME.claim, which it renews. Claims only avoid
duplicate work: every process would write the same file, and files appear atomically. The claim of a
dead process is taken over: at once on the same machine, otherwise after a minute without renewal.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from lm.config.run_file import import_plugins
from lm.data.shared_folder import SharedFolder
from lm.errors import UserError
from lm.parallel.worker_processes import end_with_parent, starting_workers_for
from lm.progress import progress_bar
from lm.storage import lock
from lm.storage.bucket import has_ended, machine_name

RENEW_SECONDS = 10.0
DEAD_AFTER_SECONDS = 60.0
POLL_SECONDS = 1.0
_CLAIM = ".claim"

Report = Callable[[int], object]  # called with the number of processed source bytes


class Task(Protocol):
    """Task that makes one file; worker processes receive it pickled."""

    @property
    def name(self) -> str:
        """Name of the file."""

    @property
    def size(self) -> int:
        """Source bytes to read."""

    def make(self, path: Path, report: Report) -> None:
        """Write the file to a local path, with the same bytes in every process."""


def build_together(
    folder: SharedFolder,
    tasks: Sequence[Task],
    workers: int,
    description: str,
    progress: bool,
    plugins: list[dict[str, Any]],
    prepare: Callable[[], None],
) -> None:
    """Build the files of all tasks in a folder, together with other processes.

    Args:
        folder: folder of the files.
        tasks: tasks, in order of priority.
        workers: number of own worker processes; 1: work in this process; 0: one per core that no
            other build on this host uses, such as one of another training process.
        description: description for the progress bar.
        progress: show a bar on stderr, for the work of all processes.
        plugins: files that worker processes import before they unpickle the tasks.
        prepare: picklable function, called first in each worker process.

    Raises:
        UserError: a task failed, or all worker processes were killed.
    """
    there = folder.sizes()
    left = [task for task in tasks if task.name not in there]
    if left:
        most = min(workers or os.cpu_count() or 1, len(left))
        cores = nullcontext(most) if workers else free_cores(most)
        with _shown(folder, tasks, description, progress), cores as n:
            if n == 1:
                _work(folder, left)
            else:
                _work_in_processes(folder, left, n, plugins, prepare)
        there = folder.sizes()
    for task in tasks:
        if task.name + _CLAIM in there:  # left by a process killed after it made the file
            folder.remove(task.name + _CLAIM)


@contextmanager
def free_cores(most: int) -> Iterator[int]:
    """Reserve cores of this host that no other build uses; yield their number, at least 1.

    A core is represented by a file lock, which is released when its process ends.

    Args:
        most: maximum number of cores.
    """
    folder, n = Path(tempfile.gettempdir(), f"lm-cores-{os.getuid()}"), 0
    with ExitStack() as held:
        for core in range(os.cpu_count() or 1):
            with suppress(UserError, OSError):  # locked by another process
                if n < most:
                    held.enter_context(lock(folder / f"{core}.lock", "held", seconds=-1.0))
                    n += 1
        yield max(n, 1)


def _work(folder: SharedFolder, tasks: Sequence[Task]) -> None:
    """Make unclaimed files until all exist."""
    claims, waited = _Claims(folder), 0.0
    while True:
        there = folder.sizes()
        tasks = [task for task in tasks if task.name not in there]
        if not tasks:
            return
        unclaimed = [task for task in tasks if task.name + _CLAIM not in there]
        made = False
        for task in unclaimed:
            if claims.take(task.name):
                claims.make(task)
                made, waited = True, 0.0
                break  # check again which files exist
        if made:
            continue
        for task in tasks:
            if claims.take_over(task.name):
                claims.make(task)
                break
        else:
            pause = min(POLL_SECONDS, 0.05 + waited / 10)
            time.sleep(pause)
            waited += pause


class _Claims:
    """Claims of this process, and observed claims of others."""

    def __init__(self, folder: SharedFolder):
        self._folder = folder
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._own = {"nonce": uuid.uuid4().hex, "machine": machine_name(), "process": os.getpid()}

    def _content(self, beat: int, done: int) -> bytes:
        return json.dumps({**self._own, "beat": beat, "done": done}).encode()

    def take(self, name: str) -> bool:
        """Claim an unclaimed file."""
        return self._folder.create(name + _CLAIM, self._content(0, 0))

    def take_over(self, name: str) -> bool:
        """Claim a file whose claiming process has ended."""
        content = self._read(name)
        if content is None:
            return False  # finished or unclaimed: the next check will tell
        now = time.monotonic()
        before, since = self._seen.setdefault(name, (content, now))
        if before != content:
            self._seen[name] = content, now
        holder = _parsed(content)
        silent = before == content and now - since > DEAD_AFTER_SECONDS
        if not (silent or has_ended(holder)):
            return False
        self._folder.write(name + _CLAIM, self._content(0, 0))
        return self._holds(name)

    def _read(self, name: str) -> bytes | None:
        try:
            return self._folder.read(name + _CLAIM)
        except FileNotFoundError:
            return None

    def _holds(self, name: str) -> bool:
        return _parsed(self._read(name) or b"").get("nonce") == self._own["nonce"]

    def make(self, task: Task) -> None:
        """Make a claimed file, and release the claim."""
        done, ended = [0], threading.Event()

        def renew() -> None:
            beat = 0
            while not ended.wait(RENEW_SECONDS):
                try:
                    if not self._holds(task.name):
                        return  # taken over while this process stalled; both write the same file
                    beat += 1
                    self._folder.write(task.name + _CLAIM, self._content(beat, done[0]))
                except (OSError, UserError):
                    continue  # the next renewal may succeed

        def report(n_bytes: int) -> None:
            done[0] += n_bytes

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            with self._folder.writing(task.name) as path:
                task.make(path, report)
        finally:
            ended.set()
            thread.join()
            if self._holds(task.name):
                self._folder.remove(task.name + _CLAIM)


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        claim = json.loads(content)
    except (ValueError, RecursionError):
        claim = None
    return claim if isinstance(claim, dict) else {}


# --- processes


@dataclass
class _Worker:
    process: Any
    errors: Connection


def _work_in_processes(
    folder: SharedFolder,
    tasks: Sequence[Task],
    workers: int,
    plugins: list[dict[str, Any]],
    prepare: Callable[[], None],
) -> None:
    # Spawned, because JAX has threads and a forked process may inherit a lock held by one.
    context = multiprocessing.get_context("spawn")
    payload = pickle.dumps((folder, list(tasks), prepare))
    alive: list[_Worker] = []
    try:
        for _ in range(workers):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_worker, args=(plugins, payload, sender), daemon=True)
            with starting_workers_for(payload + pickle.dumps(plugins)):
                process.start()
            sender.close()
            alive.append(_Worker(process, receiver))
        while alive:
            multiprocessing.connection.wait([worker.process.sentinel for worker in alive])
            for worker in [worker for worker in alive if not worker.process.is_alive()]:
                alive.remove(worker)
                if problem := _problem_of(worker):
                    raise UserError(problem)
                if worker.process.exitcode:
                    _tell_of_killed(worker.process.exitcode, len(alive))
    finally:
        for worker in alive:
            worker.process.kill()  # its file does not exist yet; its claim will expire
            worker.process.join()


def _problem_of(worker: _Worker) -> str:
    """Return the message of the error that a process ended with, or ""."""
    try:
        return worker.errors.recv() if worker.errors.poll() else ""
    except EOFError:
        return ""


def _tell_of_killed(code: int, n_left: int) -> None:
    if code > 0:
        raise RuntimeError("a tokenizing process failed: its traceback is above")
    advice = "perhaps for lack of memory: use fewer --config.data.workers"
    if not n_left:
        raise UserError(f"a tokenizing process was killed, {advice}")
    line = f"a tokenizing process was killed ({advice}); {n_left} continue"
    print(line, file=sys.stderr, flush=True)


def _worker(plugins: list[dict[str, Any]], payload: bytes, errors: Connection) -> None:
    end_with_parent()
    import_plugins(plugins, {})  # before unpickling, which resolves their classes
    folder, tasks, prepare = pickle.loads(payload)
    prepare()
    try:
        _work(folder, tasks)
    except UserError as error:
        errors.send(str(error))
    except OSError as error:  # a full or missing disk
        errors.send(f"{folder.place} cannot be written ({error.strerror or error})")


# --- progress


@contextmanager
def _shown(
    folder: SharedFolder, tasks: Sequence[Task], description: str, progress: bool
) -> Iterator[None]:
    """Show the progress of all tasks, over all processes."""
    if not progress:
        yield
        return
    total = sum(task.size for task in tasks) or None
    ended = threading.Event()
    bar = progress_bar(description, total, unit="B", unit_scale=True)

    def watch() -> None:
        while not ended.wait(2 * POLL_SECONDS):
            try:
                _update(bar, _bytes_done(folder, tasks))
            except (OSError, UserError):
                continue

    thread = threading.Thread(target=watch, daemon=True)
    with bar:
        _update(bar, _bytes_done(folder, tasks))
        bar.initial = bar.n  # exclude earlier work from the rate
        thread.start()
        try:
            yield
            _update(bar, sum(task.size for task in tasks))
        finally:
            ended.set()
            thread.join()


def _update(bar: Any, done: int) -> None:
    bar.update(max(done - bar.n, 0))


def _bytes_done(folder: SharedFolder, tasks: Sequence[Task]) -> int:
    there, done = folder.sizes(), 0
    for task in tasks:
        if task.name in there:
            done += task.size
        elif task.name + _CLAIM in there:
            try:
                found = _parsed(folder.read(task.name + _CLAIM)).get("done")
            except FileNotFoundError:
                continue
            done += min(found, task.size) if isinstance(found, int) else 0
    return done
