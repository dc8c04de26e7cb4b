import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import ml_collections
import pytest

from lm.config import default


@pytest.fixture
def make_data(tmp_path):
    """Make `data` sections: files below tmp_path, a cache of the test's own."""

    def make(**changes) -> ml_collections.ConfigDict:
        section = default().data
        section.update(
            directory=str(tmp_path),
            documents="file",
            validation_fraction=0.0,
            tokenizer="byte",
            tokenizer_vocab_size=600,
            tokenizer_min_count=1,
            sequence_length=16,
            batch_size=4,
            cache_directory=str(tmp_path / "cache"),
            workers=1,
        )
        section.update(changes)
        return section

    return make
