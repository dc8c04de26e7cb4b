"""Every test runs on eight CPU devices and compiles into one cache; fixtures that all may use."""
# ruff: noqa: E402  JAX reads its variables when it is imported

import os
from pathlib import Path

CACHE = Path(__file__).parents[1] / ".cache" / "xla"
# Variables, so that processes that a test starts inherit them.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

import hypothesis
import jax
import pytest
from absl import logging

from lm.config import default, set_value

jax.config.update("jax_num_cpu_devices", 8)  # of this process only
logging.set_verbosity(logging.ERROR)
hypothesis.settings.register_profile("lm", deadline=None, derandomize=True)
hypothesis.settings.load_profile("lm")


@pytest.fixture(scope="session", autouse=True)
def cache_directory(tmp_path_factory):
    """Token stores and tokenizers of the tests: never the user's."""
    path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LM_CACHE_DIR", str(path))
        patch.delenv("LM_DATA_DIR", raising=False)
        yield path


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """Forty documents, one a line, about 8,000 bytes; the words repeat, so a model learns them."""
    words = ["the", "a", "small", "big", "model", "reads", "every", "token", "of", "text", "now"]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    lines = (
        " ".join(words[(i * i + 3 * j * j + i * j) % len(words)] for j in range(20 + 3 * (i % 9)))
        for i in range(40)
    )
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def tiny_config(text_file):
    """Makes configurations of a 2-layer model 32 wide that reads `text_file` as bytes.

    `tiny_config(seed=1, model__norm="rmsnorm")` sets seed and model.norm.
    """

    def make(**overrides):
        config = default()
        values = {
            "model.n_layers": 2,
            "model.d_model": 32,
            "model.n_heads": 4,
            "data.source": f"text:{text_file}",
            "data.documents": "line",
            "data.validation_fraction": 0.2,
            "data.sequence_length": 32,
            "data.batch_size": 8,
            "data.workers": 1,
            "train.steps": 6,
            "checkpoint.every_steps": 3,
            "log.tensorboard": False,
        }
        for path, value in {**values, **overrides}.items():
            set_value(config, path.replace("__", "."), value)
        return config

    return make
