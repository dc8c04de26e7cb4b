"""User-written Python files: experiment files and the plug-ins they import.

An experiment file defines `get_config(variant)` and optionally VARIANTS, its variant names.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType

from lm.errors import UserError

_FOLDERS: list[Path] = []  # folders that importable() has added to sys.path


def variants_in(folder: Path) -> list[str]:
    """Return `FILE.py:VARIANT` for every variant of every experiment file in a folder, in order.

    A file without VARIANTS is one experiment, `FILE.py`; one without get_config is skipped.

    Raises:
        UserError: the folder has no experiment files, or one of them fails.
    """
    specs = []
    for file in sorted(folder.glob("*.py")):
        module = execute(file)
        if hasattr(module, "get_config"):
            variants = getattr(module, "VARIANTS", ("",))
            specs += [f"{file}:{variant}" if variant else str(file) for variant in variants]
    if not specs:
        raise UserError(f"no experiment files (*.py) in {folder}")
    return specs


def importable(folder: Path) -> None:
    """Make the modules of a folder importable, after installed packages.

    The folder stays on sys.path, because plug-ins and tokenization workers may import from it
    later. Modules of the same name that came from another experiment's folder are removed from
    sys.modules.
    """
    folder = folder.resolve()
    others = [other for other in _FOLDERS if other != folder]
    tops = {name.partition(".")[0] for name in sys.modules} - {"lm"} if others else set()
    here = {top for top in tops if (folder / f"{top}.py").is_file() or (folder / top).is_dir()}
    for name, module in list(sys.modules.items()):
        top = name.partition(".")[0]
        if top in here and any(_is_inside(module, other, top) for other in others):
            del sys.modules[name]
    if folder in _FOLDERS:
        _FOLDERS.remove(folder)
        sys.path.remove(str(folder))
    at = min((sys.path.index(str(f)) for f in _FOLDERS), default=len(sys.path))
    sys.path.insert(at, str(folder))
    _FOLDERS.insert(0, folder)
    importlib.invalidate_caches()


def _is_inside(module: ModuleType, folder: Path, top: str) -> bool:
    file = Path(getattr(module, "__file__", None) or "").resolve()
    return file == folder / f"{top}.py" or folder / top in file.parents


def execute(file: Path) -> ModuleType:
    """Execute a Python file as a module with a unique name.

    Raises:
        UserError: the file does not exist, is not a Python file, or fails.
    """
    form = "an experiment file is FILE.py[:VARIANT], or a run's run.json"
    if file.is_dir():
        raise UserError(f"{file} is a folder; {form}")
    if not file.is_file():
        raise UserError(f"no experiment file {file}")
    if file.suffix != ".py":
        raise UserError(f"{file} is not a Python file; {form}")
    importable(file.parent)
    digest = hashlib.sha256(os.fsencode(file.resolve())).hexdigest()[:8]
    name = f"experiment_{re.sub(r'[^0-9a-zA-Z]', '_', file.stem)}_{digest}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look modules up by name
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        raise error_in(file, error) from error
    return module


def error_in(file: Path, error: BaseException) -> UserError:
    """Convert an exception (or exit) of user code to a UserError with its location.

    Raises:
        KeyboardInterrupt: `error` is one.
    """
    if isinstance(error, KeyboardInterrupt):
        raise error
    if isinstance(error, UserError):
        message = str(error)
        return UserError(message if str(file) in message else f"{file}: {message}")
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == file.absolute()]
    where = f"{file}:{lines[-1]}" if lines else str(file)
    return UserError(f"{where}: {type(error).__name__}: {error}")
