import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.models.decoder import Decoder
from lm.models.transformer_config import TransformerConfig

TINY = TransformerConfig(
    n_layers=2, d_model=32, n_heads=4, n_kv_heads=4, head_dim=8, d_ff=64, vocab_size=96,
    max_length=96,
)  # fmt: skip


@functools.cache
def _make_model(changes):
    fields = {name: getattr(TINY, name) for name in TINY.__dataclass_fields__}
    model = Decoder(TransformerConfig(**fields | dict(changes)))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        centre, deviation = (1, 0.2) if path[-1].key == "scale" else (0, 0.3)
        return np.float32(rng.normal(centre, deviation, leaf.shape))

    return model, jax.tree_util.tree_map_with_path(draw, nn.meta.unbox(shapes["params"]))


@pytest.fixture
def make_model():
    """Make (model, params) 2 layers deep and 32 wide with the given changes of its config.

    Every parameter is random, biases and norm scales too: none has a special value.
    """
    return lambda **changes: _make_model(tuple(sorted(changes.items())))
