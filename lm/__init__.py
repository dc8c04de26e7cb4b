"""lm: pretraining, fine-tuning, evaluation and generation of language models in JAX and Flax.

From Python:

    import lm

    config = lm.load_config("experiments/stdlib.py:tiny", {"train.steps": 100})
    lm.train(config, "runs/tiny")
    run = lm.load_run("runs/tiny")
    logits_BLV = run.logits(run.encode("def main():")[None])
    (text,) = lm.generate(run, "def main():", max_new_tokens=40)

Every name is imported on first use; the functions print nothing and never exit the process.
lm/README.md lists the modules and their contents.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm.api import Run, evaluate, generate, load_run
    from lm.config import load_config
    from lm.config.registries import (
        METRICS,
        MIXERS,
        MODELS,
        OBJECTIVES,
        OPTIMIZERS,
        SCHEDULES,
        SOURCES,
        TOKENIZERS,
    )
    from lm.errors import UserError
    from lm.experiment import build
    from lm.training.trainer import train

_PLACES = {
    **dict.fromkeys(("Run", "evaluate", "generate", "load_run"), "lm.api"),
    **dict.fromkeys(
        (
            "METRICS",
            "MIXERS",
            "MODELS",
            "OBJECTIVES",
            "OPTIMIZERS",
            "SCHEDULES",
            "SOURCES",
            "TOKENIZERS",
        ),
        "lm.config.registries",
    ),
    "UserError": "lm.errors",
    "build": "lm.experiment",
    "load_config": "lm.config",
    "train": "lm.training.trainer",
}

__all__ = [
    "METRICS",
    "MIXERS",
    "MODELS",
    "OBJECTIVES",
    "OPTIMIZERS",
    "SCHEDULES",
    "SOURCES",
    "TOKENIZERS",
    "Run",
    "UserError",
    "build",
    "evaluate",
    "generate",
    "load_config",
    "load_run",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'lm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
