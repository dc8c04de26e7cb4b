"""Every configuration key: its default, meaning and range. `lm config --keys` prints this table."""

from __future__ import annotations

from lm.schema.data import DATA
from lm.schema.key import Key
from lm.schema.learning import LEARNING
from lm.schema.model import MODEL
from lm.schema.running import RUNNING

__all__ = ["SCHEMA", "Key"]

SCHEMA: dict[str, Key] = {
    "seed": Key(0, "Seed of initialisation, dropout and data order.", low=0, high=2**31 - 1),
    "paper": Key("", "Name of the published model that this configuration reproduces."),
    **MODEL,
    **DATA,
    **LEARNING,
    **RUNNING,
}
