"""Stored teacher distributions: the most likely tokens at every position (`lm score`).

Shape letters: L length, K most likely tokens.
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
# File names of a store, and dtype of the array [windows, L, K] in each.
FILES = {"{}-logps.npy": np.float32, "{}-ids.npy": np.int32}


def stored_key(store: Any) -> str:
    """Return the file prefix of a store."""
    return store.manifest.source_digest[:32]


@dataclass(frozen=True, eq=False)
class TaughtWindows:
    """Windows of a store, each with "teacher_logps" and "teacher_ids" [L, K].

    Attributes:
        windows: windows of token ids.
        log_probs: log-probabilities of the K most likely tokens, [windows, L, K], memory-mapped.
        ids: ids of these tokens.
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
    """Read the settings of a folder of `objective.teacher_logits`.

    Raises:
        UserError: the folder does not contain complete teacher logits.
    """
    where = f"--config.objective.teacher_logits={folder}"
    try:
        found = read_json(Path(folder) / MANIFEST)
        known = {name: found[name] for name in ("top_k", "sequence_length", "isolate_documents")}
        return {**known, "tokenizer": found["tokenizer"]}
    except (OSError, KeyError, TypeError, UserError) as error:
        raise UserError(
            f"{where}: no completed output of `lm score --top_logits` ({MANIFEST})"
        ) from error


def taught_windows(
    windows: TokenWindows, store: TokenStore, folder: str, isolate_documents: bool
) -> TaughtWindows:
    """Attach stored teacher distributions to windows.

    Args:
        windows: windows of the store.
        store: token store.
        folder: `objective.teacher_logits`.
        isolate_documents: `data.isolate_documents`.

    Raises:
        UserError: the stored windows, text or tokenizer differ.
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
            raise UserError(f"{where} has no logits for {store.manifest.source}") from error
        shape = (windows.length, settings["top_k"])
        if arrays[-1].shape[1:] != shape or len(arrays[-1]) < len(windows):
            raise UserError(f"{where}: {file.name} is damaged")
    return TaughtWindows(windows, *arrays)
