"""Models and parameters as decoding takes them: unrolled, cast, in int8."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import default
from lm.decoding import sampling
from lm.decoding.controls import Controls
from lm.decoding.sampling import Sampling, sample_steps
from lm.decoding.weights import prepare, unroll
from lm.experiment import build
from lm.models.decoder import Decoder
from lm.models.quantized_kernel import QuantizedKernel
from lm.models.transformer_config import TransformerConfig
from lm.models.variables import flat

SMALL = {
    "n_layers": 4, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 64,
    "vocab_size": 48, "max_length": 300,
}  # fmt: skip
PROMPTS = ([5, 1, 7, 2], [3], [9, 9, 4, 11, 0, 6, 8])
FAMILIES = {
    "gpt2": {"scan_unroll": 0, "remat": "full"},
    "gemma": {
        "positions": "rotary", "norm": "rmsnorm", "norm_placement": "both", "activation": "geglu",
        "bias": False, "window": 3, "global_every": 2, "rope_theta_local": 20.0,
        "attention_softcap": 2.0,
    },
    "experts": {"n_experts": 4, "experts_every": 2, "dense_layers": 1, "norm": "rmsnorm"},
}  # fmt: skip


def tokens_of(model, params, n=12, **options):
    steps = sample_steps(model, params, PROMPTS, n, Sampling(0.0), 0, Controls(), **options)
    return np.stack(list(steps), axis=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unrolled_model_writes_what_the_stacked_one_computes(family):
    model = Decoder(TransformerConfig(**SMALL | FAMILIES[family] | {"init_std": 0.4}))
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), int)))["params"]
    unrolled, parts = unroll(model, params)
    assert unrolled.config.unrolled
    assert unrolled.config.remat == "none"
    assert "stack/layers/3/attention/query/kernel" in flat(parts)
    assert unroll(unrolled, parts)[1] is parts
    written = tokens_of(unrolled, parts)
    apply = jax.jit(model.apply)
    for prompt, row in zip(PROMPTS, written, strict=True):
        padded = np.zeros((1, 24), int)
        text = [*prompt, *row]
        padded[0, : len(text)] = text
        logits = apply({"params": params}, padded)[0]
        expected = logits[len(prompt) - 1 : len(text) - 1].argmax(-1)
        np.testing.assert_array_equal(row, expected)


def test_a_cache_that_grows_changes_nothing(monkeypatch):
    model = Decoder(TransformerConfig(**SMALL, init_std=0.4))
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), int)))["params"]
    whole = tokens_of(model, params, n=40)
    monkeypatch.setattr("lm.decoding.sampling._SHORTEST_CACHE", 16)
    np.testing.assert_array_equal(tokens_of(model, params, n=40, per_dispatch=5), whole)


def prepared(**changes):
    config = default()
    config.model.update({k: v for k, v in SMALL.items() if k != "max_length"})
    config.data.sequence_length = 300
    config.update_from_flattened_dict(changes)
    experiment = build(config, jax.devices()[:1])
    params = experiment.init_state().params
    return experiment, params, *prepare(experiment, params)


@pytest.mark.parametrize("cache", ["float32", "bfloat16", "int8"])
def test_weights_and_cache_in_fewer_bits_compute_nearly_the_same(cache):
    weights = cache
    experiment, params, made, kept = prepared(**{"decode.weights": weights, "decode.cache": cache})
    model, tokens = made.model, np.arange(24).reshape(2, 12)
    full = experiment.model.apply({"params": params}, tokens)[:, -1]
    logits = None
    cache = model.empty_cache(2, 12)
    step = jax.jit(lambda *x: model.apply({"params": kept}, *x, method="decode"))
    ones = np.ones((2, 6), int)
    for at in (0, 6):
        columns = slice(at, at + 6)
        positions = np.tile(np.arange(at, at + 6), (2, 1))
        logits, cache = step(tokens[:, columns], positions, ones, cache)
    error = np.abs(logits[:, -1] - full).max() / np.abs(full).max()
    assert error < {"float32": 1e-5, "bfloat16": 0.03, "int8": 0.05}[weights]
    held = {str(x.dtype) for x in jax.tree.leaves(cache.mixers)}
    assert held == ({weights} if weights != "int8" else {"int8", "float32"})


def test_kernels_are_stored_as_the_option_says():
    kernel = "stack/layers/0/attention/query/kernel"
    *_, kept = prepared(**{"decode.weights": "int8"})
    found = flat(kept)[kernel]
    assert isinstance(found, QuantizedKernel)
    assert found.values.dtype == jnp.int8
    assert found.scale.shape == (1, 4, 8)
    *again, kept = prepared(**{"decode.weights": "int8", "model.family": "lstm"})
    twice = prepare(again[-1], kept)[1]  # as the Python API does
    assert jax.tree.structure(twice) == jax.tree.structure(kept)
    assert {str(x.dtype) for x in jax.tree.leaves(twice)} == {"int8", "float32"}
    *_, kept = prepared(**{"model.dtype": "bfloat16"})
    dtypes = {path: x.dtype for path, x in flat(kept).items()}
    assert dtypes[kernel] == dtypes["tokens/embedding"] == jnp.bfloat16
    assert dtypes["stack/final_norm/scale"] == jnp.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_copies_neither_cache_nor_table(dtype, monkeypatch):
    *_, made, kept = prepared(**{"model.dtype": dtype})
    programs = []

    def compiled(*args):
        programs.append(proceed.lower(*args).compile().as_text())
        return proceed(*args)

    proceed = sampling._continue
    monkeypatch.setattr(sampling, "_continue", compiled)
    tokens_of(made.model, kept, n=4)
    cache, table = r"f32\[(1,)?3,2,20,8\]\S* ", r"f32\[48,32\]\S* "
    assert re.search(cache + "fusion", programs[0])
    assert not re.search(f"{cache}copy|{table}(copy|fusion)", programs[0])
