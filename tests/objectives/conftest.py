from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from lm.data.store import Manifest, TokenStore


@pytest.fixture
def make_store():
    """Make token stores of documents, lists of ids, in memory."""

    def make(documents, delimiter=None):
        known = {"source": "memory", "dtype": "uint32", "delimiter": delimiter}
        manifest = Manifest(**dict.fromkeys((field.name for field in fields(Manifest)), 0) | known)
        offsets = np.cumsum([0, *map(len, documents)])
        return TokenStore(Path(), manifest, np.concatenate(documents), offsets)

    return make


@pytest.fixture
def make_scorer():
    """Make models that give constant scores and record their inputs in `calls`."""

    class Scorer:
        config, deterministic = SimpleNamespace(loss_chunk=0), True

        def __init__(self, logits):
            self._logits, self.calls = jnp.asarray(logits, jnp.float32), []

        def hidden(self, *inputs, **named):
            self.calls.append((inputs, named))
            return self._logits

        decoder_hidden = hidden

        def logits(self, x):
            return x

    return Scorer
