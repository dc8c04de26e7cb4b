"""Every configuration key: its default, meaning and range. `lm config --keys` prints this table."""

from __future__ import annotations

from lm.config.data_keys import DATA
from lm.config.key import Key
from lm.config.learning_keys import LEARNING
from lm.config.model_keys import MODEL
from lm.config.run_keys import RUNNING

__all__ = ["SCHEMA", "Key"]

SCHEMA: dict[str, Key] = {
    "seed": Key(0, "Seed of initialisation, dropout and data order.", low=0, high=2**31 - 1),
    "paper": Key("", "Name of the published model that this configuration reproduces."),
    **MODEL,
    **DATA,
    **LEARNING,
    **RUNNING,
}
