"""Arrays filled from blocks: the same numbers on every mesh, without extra memory."""

import itertools
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.interop.model_parameters import load_sharded

SHAPE = (3, 8, 4)


def blocks(x):
    """Unequal ones, in no particular order."""
    bounds = [(0, 2, 3), (0, 5, 8), (0, 4)]
    parts = [list(itertools.pairwise(of_axis)) for of_axis in bounds]
    for corner in reversed(list(itertools.product(*parts))):
        yield tuple(low for low, _ in corner), x[tuple(slice(*part) for part in corner)]


@pytest.mark.parametrize(
    "spec",
    [(), (None, "a"), (None, "b", "a"), (None, ("a", "b"))],
)
def test_every_shard_holds_its_part(spec):
    x = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    mesh = Mesh(np.asarray(jax.devices()[:8]).reshape(4, 2), ("a", "b"))
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    placed = load_sharded(SHAPE, sharding, blocks(x))
    assert placed.sharding == sharding
    for shard in placed.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), x[shard.index])


def test_placed_state_can_be_donated():
    x = np.ones((64, 64), np.float32)
    one = NamedSharding(Mesh(jax.devices()[:1], "x"), PartitionSpec())
    placed = load_sharded(x.shape, one, [((0, 0), x)])
    doubled = jax.jit(lambda y: y * 2, donate_argnums=0)(placed)
    np.testing.assert_array_equal(np.asarray(doubled), 2 * x)
    np.testing.assert_array_equal(x, np.ones_like(x))


MEASURE = """
import sys
from pathlib import Path
from lm.interop.model_folder import open_model_folder

def high_water():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

found = open_model_folder(Path(sys.argv[1]))
found.parameters
before = high_water()
params = found.params()
print(high_water() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_reading_needs_the_shards_and_a_fifth_of_the_largest_tensor(tmp_path):
    from lm.interop import huggingface
    from lm.models.decoder import Decoder
    from lm.models.transformer_config import TransformerConfig

    sizes = {"n_layers": 4, "d_model": 512, "n_heads": 8, "n_kv_heads": 8, "head_dim": 64}
    config = TransformerConfig(
        **sizes,
        d_ff=2048,
        vocab_size=40_000,
        max_length=64,
        norm="rmsnorm",
        positions="rotary",
        activation="swiglu",
        bias=False,
        norm_bias=False,
        tie_embeddings=False,
    )
    model = Decoder(config)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 1), np.int32)))
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes["params"])
    huggingface.save(model, params, tmp_path)
    total = sum(x.nbytes for x in jax.tree.leaves(params))
    largest = 40_000 * 512 * 4
    words = [sys.executable, "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert int(done.stdout) <= total + 1.2 * largest
