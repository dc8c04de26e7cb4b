"""Engine programs, compiled for absent TPUs, read and write pages in place."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import jax
import pytest

from lm.config import load_config, set_value
from lm.decoding.engine.shapes import lower_programs, state_shapes
from lm.decoding.engine.sizes import EngineOptions
from lm.decoding.weights import prepare
from lm.experiment import build
from lm.models.layer_pages import KernelPages
from lm.tools.planning.topologies import topology

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")

EXPERIMENTS = Path(__file__).parents[3] / "experiments"
N_PAGES = 16384  # a layer's pages are too large for a core's vector memory
TINY = {
    "model.n_layers": 2,
    "model.d_model": 256,
    "model.n_heads": 8,
    "model.n_kv_heads": 2,
    "model.head_dim": 64,
    "model.d_ff": 256,
    "model.vocab_size": 512,
    "model.max_length": 0,
    "data.sequence_length": 256,
    "parallel.preset": "custom",
    "parallel.mesh.data": 1,
    "parallel.mesh.tensor": 4,
}
WINDOWS = {"model.window": 64, "model.global_every": 2, "model.attention_softcap": 20.0}


@pytest.mark.parametrize(
    ("changes", "layout", "of_device"),
    [
        # Four devices have one key/value head each: two heads twice.
        (WINDOWS, KernelPages, (N_PAGES, 32, 2, 128)),
    ],
    ids=["kernel"],
)
def test_no_program_copies_the_pages(changes, layout, of_device):
    config = load_config(str(EXPERIMENTS / "llama.py:3-8b"))
    for path, value in (TINY | changes).items():
        set_value(config, path, value)
    experiment = build(config, topology("v5e:2x2").devices)
    shapes, shardings = experiment.state_shapes.params, experiment.state_sharding.params
    params = jax.tree.map(
        lambda x, of: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=of), shapes, shardings
    )
    options = EngineOptions(n_rows=4, context=256, chunk=64)
    prepared = prepare(experiment, params)
    pages = state_shapes(prepared[0], options, N_PAGES).pages
    assert {type(of_layer) for of_layer in pages} == {layout}
    held = jax.tree.leaves(pages)
    assert {x.sharding.shard_shape(x.shape) for x in held} == {of_device}
    n_bytes = sum(of_layer.bytes_of_device(experiment.mesh) for of_layer in pages)
    for lowered in lower_programs(*prepared, options, N_PAGES).values():
        compiled = lowered.compile()
        memory, text = compiled.memory_analysis(), compiled.as_text()
        assert memory.alias_size_in_bytes >= n_bytes
        assert memory.temp_size_in_bytes < n_bytes / len(held) / 4
        n_calls = text.count('custom_call_target="tpu_custom_call"')
        assert n_calls == (len(pages) if layout is KernelPages else 0)
        shape = re.escape("[" + ",".join(map(str, of_device)) + "]")
        assert not re.search(rf"= \w+{shape}\S* (copy|transpose|all-gather)\(", text)
