"""Plug-ins in tests: undo the effects of importing them into this process."""

from __future__ import annotations

import sys

from lm.config import experiment_file
from lm.config.registries import REGISTRIES


def forget_plugins():
    """Bring registries, modules and path into the state of a fresh process."""
    for registry in REGISTRIES:
        registry.entries = {n: e for n, e in registry.entries.items() if not e.plugin}
        registry.version += 1
    for folder in experiment_file._FOLDERS:
        sys.path.remove(str(folder))
    experiment_file._FOLDERS.clear()
    for name in [name for name in sys.modules if name.startswith(("my_plugin", "experiment_"))]:
        del sys.modules[name]
