"""What is known of one configuration key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Key:
    """One configuration key.

    `low` and `high` are inclusive. A `free` key may differ between two starts of the same run:
    it changes how the run is executed, not what it learns.
    """

    default: Any
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    free: bool = False

    @property
    def type(self) -> type:
        return type(self.default)
