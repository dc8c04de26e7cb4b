import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import ml_collections
import pytest


@pytest.fixture
def make_data(tmp_path):
    """Makes `data` sections: files below tmp_path, a cache of the test's own."""

    def make(**changes) -> ml_collections.ConfigDict:
        section = ml_collections.ConfigDict(
            {
                "source": "stdlib",
                "weights": (),
                "directory": str(tmp_path),
                "field": "text",
                "documents": "file",
                "token_dtype": "",
                "end_token": "",
                "split": "train",
                "validation_split": "validation",
                "validation_source": "",
                "test_source": "",
                "validation_fraction": 0.0,
                "canaries": 0,
                "columns": "",
                "header": True,
                "bad_rows": "error",
                "labels": "",
                "tokenizer": "byte",
                "tokenizer_vocab_size": 600,
                "tokenizer_min_count": 1,
                "lowercase": False,
                "sequence_length": 16,
                "stride": 0,
                "isolate_documents": True,
                "batch_size": 4,
                "cache_directory": str(tmp_path / "cache"),
                "shard_cache": 1.0,
                "workers": 1,
            }
        )
        section.update(changes)
        return section

    return make
