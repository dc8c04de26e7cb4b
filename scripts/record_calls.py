"""Run a command of lm and record which files of lm/ its calls enter; used by `structure.py`.

    python scripts/record_calls.py VERB FOLDER OPTION …    (lm is found on PYTHONPATH)

The run is FOLDER/run. FOLDER/VERB.json gets "files" (those of which a function ran), "modules" (all
that are loaded at the end) and "threads": for each thread, the main one first, its calls in order
as (calling file, called file, whether an argument is the object that the scenario follows).

`train` is recorded from the call of the experiment file's get_config until Orbax returns from the
first save, and the scenario follows the configuration. Other commands are recorded whole; the
scenario follows the run's folder (export) or the parsed arguments (generate).
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import runpy
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any


class Recorder:
    """Profile function that records calls between functions of the package at `root`.

    Code that runs while a module of the package is being imported is left out. A thread's call from
    one place in the code counts once, however often a loop repeats it.
    """

    def __init__(self, root: Path, is_object: Callable[[Any], bool]):
        self.files: set[str] = set()
        self.modules: list[str] = []
        self.threads: dict[threading.Thread, dict[tuple, tuple[str, str, bool]]]
        self.threads = {threading.main_thread(): {}}
        self._prefix, self._is_object = f"{root}/", is_object

    def start(self) -> None:
        threading.setprofile(self)
        sys.setprofile(self)

    def stop(self) -> None:
        """Stop recording; remember the loaded modules."""
        threading.setprofile(None)
        sys.setprofile(None)
        self.modules = self.modules or sorted(sys.modules)

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event != "call" or self.modules:
            return
        for running in (frame, frame.f_back):  # whoever calls runs too
            if (file := self._file(running)) and file not in self.files and not _importing(running):
                self.files.add(file)
        code, file = frame.f_code, self._file(frame)
        # The argument of the instruction RESUME is 0 where a function or generator begins.
        resumed = code.co_flags & inspect.CO_GENERATOR and code.co_code[frame.f_lasti + 1]
        unnamed = code.co_name.startswith("<") and code.co_name != "<lambda>"
        if not file or resumed or unnamed or _importing(frame):
            return
        caller = frame.f_back
        while caller is not None and not self._file(caller):
            caller = caller.f_back
        place = (self._file(caller), caller.f_code.co_qualname, caller.f_lasti) if caller else ("",)
        carries = self._carries(frame)
        calls = self.threads.setdefault(threading.current_thread(), {})
        calls.setdefault((*place, file, code.co_qualname, carries), (place[0], file, carries))

    def _file(self, frame: FrameType | None) -> str:
        """Return the file of a running function of the package; "" for any other code."""
        if frame is None or not frame.f_code.co_flags & inspect.CO_OPTIMIZED:
            return ""  # the body of a module or class
        path = frame.f_code.co_filename
        return path.removeprefix(self._prefix) if path.startswith(self._prefix) else ""

    def _carries(self, frame: FrameType) -> bool:
        """Return whether an argument, or an attribute of one, is the object."""
        code, values = frame.f_code, frame.f_locals
        n = code.co_argcount + code.co_kwonlyargcount
        for value in [values.get(name) for name in code.co_varnames[:n]]:
            ours = type(value).__module__.partition(".")[0] in ("lm", "argparse")
            attributes = list(getattr(value, "__dict__", {}).values()) if ours else []
            if any(map(self._is_object, [value, *attributes])):
                return True
        return False


def _importing(frame: FrameType | None) -> bool:
    """Return whether a module of lm is currently being imported."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "").partition(".")[0]
        if module == "lm" and frame.f_code.co_name == "<module>":
            return True
        frame = frame.f_back
    return False


def main(verb: str, folder: str, *options: str) -> None:
    """Run `lm VERB` in this process under a `Recorder`; write FOLDER/VERB.json."""
    run = f"{folder}/run"

    def is_workdir(value: Any) -> bool:
        return isinstance(value, str | os.PathLike) and f"{os.fspath(value)}/".startswith(f"{run}/")

    objects: dict[str, Callable[[Any], bool]] = {
        "train": lambda value: type(value).__name__ == "ConfigDict",
        "export": is_workdir,
        "generate": lambda value: isinstance(value, argparse.Namespace),
    }
    recorder = Recorder(Path(os.environ["PYTHONPATH"]) / "lm", objects[verb])

    def start_at_config(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_name == "get_config":
            recorder.start()
            recorder(frame, event, argument)

    if verb == "train":
        from orbax.checkpoint import CheckpointManager as Manager

        save = Manager.save
        Manager.save = lambda *args, **kwargs: (save(*args, **kwargs), recorder.stop())[0]
        sys.setprofile(start_at_config)
    else:
        recorder.start()
    sys.argv = ["lm", verb, f"--workdir={run}", *options]
    try:
        runpy.run_module("lm", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
    if not recorder.files or (verb == "train" and not recorder.modules):
        sys.exit("no call of lm was seen, or no call of Orbax's CheckpointManager.save")
    recorder.stop()
    threads = [list(calls.values()) for calls in recorder.threads.values()]
    found = {"files": sorted(recorder.files), "modules": recorder.modules, "threads": threads}
    Path(folder, f"{verb}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
