"""Stored distributions of a teacher: the likeliest tokens of every window (`lm score`).

Shape letters: L length, K likeliest tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lm.data.store import TokenStore, TokenWindows
from lm.errors import UserError
from lm.storage import read_json

MANIFEST = "teacher.json"
# Name of each file of a store, and dtype of its array [windows, L, K].
FILES = {"{}-logps.npy": np.float32, "{}-ids.npy": np.int32}


def stored_key(store: Any) -> str:
    """Return the name of a store's files."""
    return store.manifest.source_digest[:32]


@dataclass(frozen=True, eq=False)
class TaughtWindows:
    """Windows of a store, with "teacher_logps" and "teacher_ids" [L, K] of each.

    Attributes:
        windows: the windows.
        log_probs: log-probabilities of the likeliest tokens, [windows, L, K], memory-mapped.
        ids: these tokens.
    """

    windows: TokenWindows
    log_probs: np.ndarray
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        found = self.windows[index]
        return {**found, "teacher_logps": self.log_probs[index], "teacher_ids": self.ids[index]}


@cache
def stored_settings(folder: str) -> dict[str, Any]:
    """Return what the folder of `objective.teacher_logits` says of itself.

    Raises:
        UserError: it is no such folder, or it is not whole.
    """
    where = f"--config.objective.teacher_logits={folder}"
    try:
        found = read_json(Path(folder) / MANIFEST)
        known = {name: found[name] for name in ("top_k", "sequence_length", "isolate_documents")}
        return {**known, "tokenizer": found["tokenizer"]}
    except (OSError, KeyError, TypeError, UserError) as error:
        raise UserError(
            f"{where}: no folder that `lm score --top_logits` has finished ({MANIFEST})"
        ) from error


def taught_windows(
    windows: TokenWindows, store: TokenStore, folder: str, isolate_documents: bool
) -> TaughtWindows:
    """Return windows with what was stored of them.

    Args:
        windows: windows of the store.
        store: the store.
        folder: `objective.teacher_logits`.
        isolate_documents: `data.isolate_documents`.

    Raises:
        UserError: they were stored of other windows or another text, or with another tokenizer.
    """
    where, settings = f"--config.objective.teacher_logits={folder}", stored_settings(folder)
    wanted = {
        "sequence_length": windows.length,
        "isolate_documents": isolate_documents,
        "tokenizer": store.manifest.tokenizer_digest,
    }
    for name, value in wanted.items():
        if settings[name] != value:
            raise UserError(f"{where}: stored with {name} {settings[name]}, not {value}")
    if windows.stride != windows.length:
        raise UserError(f"{where} has no overlapping windows: --config.data.stride must be 0")
    arrays = []
    for name in FILES:
        file = Path(folder) / name.format(stored_key(store))
        try:
            arrays.append(np.load(file, mmap_mode="r"))
        except (OSError, ValueError) as error:
            raise UserError(f"{where}: nothing was stored of {store.manifest.source}") from error
        shape = (windows.length, settings["top_k"])
        if arrays[-1].shape[1:] != shape or len(arrays[-1]) < len(windows):
            raise UserError(f"{where}: {file.name} is damaged")
    return TaughtWindows(windows, *arrays)
