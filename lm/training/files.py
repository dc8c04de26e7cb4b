"""Files of a run that are replaced whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(file: Path, text: str) -> None:
    """Replace `file` by `text`; a reader, or a crash, sees the old or the new, never a part."""
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)
