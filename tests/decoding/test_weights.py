"""Models and parameters prepared for decoding: unrolled, cast, in int8."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import default
from lm.decoding import sampling
from lm.decoding.controls import Controls
from lm.decoding.sampling import Sampling, decode_last, sample_steps
from lm.decoding.weights import BITS, prepare, round_weights, unroll, weight_bytes
from lm.experiment import build
from lm.models.decoder import Decoder
from lm.models.quantized_kernel import QuantizedKernel
from lm.models.transformer_config import TransformerConfig
from lm.models.variables import flat
from lm.parallel.mesh import use_mesh

SMALL = {
    "n_layers": 4, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 64,
    "vocab_size": 48, "max_length": 300,
}  # fmt: skip
PROMPTS = ([5, 1, 7, 2], [3], [9, 9, 4, 11, 0, 6, 8])
FAMILIES = {
    "gpt2": {"n_layers": 2, "scan_unroll": 0, "remat": "full"},
    "gemma": {
        "n_layers": 2, "positions": "rotary", "norm": "rmsnorm", "norm_placement": "both",
        "activation": "geglu", "bias": False, "window": 3, "global_every": 2,
        "rope_theta_local": 20.0, "attention_softcap": 2.0,
    },
    "experts": {"n_experts": 4, "experts_every": 2, "dense_layers": 1, "norm": "rmsnorm"},
}  # fmt: skip


def tokens_of(model, params, n=12, **options):
    steps = sample_steps(model, params, PROMPTS, n, Sampling(0.0), 0, Controls(), **options)
    return np.stack(list(steps), axis=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_unrolled_model_writes_what_the_stacked_one_computes(family):
    model = Decoder(TransformerConfig(**SMALL | FAMILIES[family] | {"init_std": 0.4}))
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), int)))["params"]
    unrolled, parts = unroll(model, params)
    assert unrolled.config.unrolled
    assert unrolled.config.remat == "none"
    last = model.config.n_layers - 1
    assert f"stack/layers/{last}/attention/query/kernel" in flat(parts)
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


def test_growing_the_cache_changes_nothing(monkeypatch):
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


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
def test_weights_and_cache_in_fewer_bits_compute_nearly_the_same(weights):
    cache = "int8" if weights == "int4" else weights
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
    assert error < {"float32": 1e-5, "bfloat16": 0.03, "int8": 0.05, "int4": 0.4}[weights]
    held = {str(x.dtype) for x in jax.tree.leaves(cache.mixers)}
    assert held == ({"int8", "float32"} if weights in BITS else {weights})


def test_kernels_are_stored_as_the_option_says():
    kernel = "stack/layers/0/attention/query/kernel"
    *_, kept = prepared(**{"decode.weights": "int8"})
    found = flat(kept)[kernel]
    assert isinstance(found, QuantizedKernel)
    assert found.values.dtype == jnp.int8
    assert found.scale.shape == (1, 4, 8)
    assert isinstance(flat(kept)["tokens/embedding"], QuantizedKernel)
    *_, kept = prepared(**{"decode.weights": "int4"})
    found = flat(kept)[kernel]
    assert found.values.dtype == jnp.uint8
    assert found.values.shape == (1, 16, 4, 8)
    assert flat(kept)["tokens/embedding"].values.shape == (48, 1, 16)
    *again, kept = prepared(**{"decode.weights": "int8", "model.family": "lstm"})
    twice = prepare(again[-1], kept)[1]  # as the Python API does
    assert jax.tree.structure(twice) == jax.tree.structure(kept)
    assert {str(x.dtype) for x in jax.tree.leaves(twice)} == {"int8", "float32"}
    *_, kept = prepared(**{"model.dtype": "bfloat16"})
    dtypes = {path: x.dtype for path, x in flat(kept).items()}
    assert dtypes[kernel] == dtypes["tokens/embedding"] == jnp.bfloat16
    assert dtypes["stack/final_norm/scale"] == jnp.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_step_copies_neither_cache_nor_table(dtype, monkeypatch):
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


LARGER = {"model.d_model": 128, "model.d_ff": 512, "model.vocab_size": 512, "model.n_layers": 2}
GATED = {"model.activation": "swiglu", "model.norm": "rmsnorm", "model.tie_embeddings": False}


@pytest.mark.parametrize("weights", BITS)
@pytest.mark.parametrize("model", [{}, GATED], ids=["tied", "gated"])
def test_quantized_weights_are_as_small_as_promised(weights, model):
    experiment, params, _, kept = prepared(**LARGER, **model, **{"decode.weights": weights})
    n_bytes, of_bfloat16 = weight_bytes(experiment, params)
    assert n_bytes == sum(x.nbytes for x in jax.tree.leaves(kept))
    assert of_bfloat16 == 2 * sum(x.size for x in jax.tree.leaves(params))
    assert n_bytes / of_bfloat16 <= {"int8": 0.55, "int4": 0.30}[weights]


@pytest.mark.parametrize("weights", BITS)
def test_evaluation_has_the_weights_that_decoding_reads(weights):
    lines = []
    experiment, params, made, kept = prepared(**{"decode.weights": weights})
    rounded = round_weights(experiment, params, lines.append)
    assert f"{weights} weights" in lines[0]
    _, again = prepare(experiment, rounded)
    for path, found in flat(again).items():  # a scale and its values may change signs together
        one, other = map(nn.meta.unbox, (found, flat(kept)[path]))
        np.testing.assert_allclose(one, other, rtol=1e-6)
    tokens = np.arange(24).reshape(2, 12)
    apply = jax.jit(experiment.model.apply)
    np.testing.assert_allclose(
        apply({"params": rounded}, tokens), made.model.apply({"params": kept}, tokens), atol=1e-4
    )
    assert np.abs(apply({"params": rounded}, tokens) - apply({"params": params}, tokens)).max() > 0


MESH = {
    "parallel.mesh.data": 1, "parallel.mesh.expert": 2, "parallel.mesh.tensor": 2,
    "parallel.mesh.fsdp": 2,
}  # fmt: skip


def test_quantized_kernels_stay_on_the_devices_of_those_they_replace():
    """And a step of decoding computes what one device does."""
    changes = MESH | {"parallel.preset": "custom", "decode.weights": "int4"}
    changes |= {"model.d_model": 128, "model.d_ff": 128, "model.n_experts": 4, "model.n_layers": 1}
    logits = []
    for devices in (1, 8):
        config = default()
        config.model.update({k: v for k, v in SMALL.items() if k != "max_length"})
        config.data.sequence_length, config.data.batch_size = 32, 8
        sizes = {k: v if devices > 1 else 1 for k, v in changes.items() if "mesh" in k}
        config.update_from_flattened_dict(changes | sizes)
        experiment = build(config, jax.devices()[:devices])
        params = experiment.init_state().params
        made, kept = prepare(experiment, params)
        with use_mesh(experiment.mesh):
            cache = made.model.empty_cache(8, 12)
            inputs = np.arange(96).reshape(8, 12) % 48, np.tile(np.arange(12), (8, 1))
            step = jax.jit(lambda p, *x, m=made.model: decode_last(m, p, *x)[0])
            logits.append(np.asarray(step(kept, *inputs, np.ones((8, 12), int), cache)))
    np.testing.assert_allclose(*logits, atol=2e-4)
    leaves = flat(kept)
    kernel = leaves["stack/layers/0/attention/query/kernel"]
    assert kernel.values.sharding.shard_shape(kernel.values.shape) == (2, 16, 2, 8)
    experts = next(x for path, x in leaves.items() if path.endswith("experts/in/kernel"))
    assert experts.values.sharding.shard_shape(experts.values.shape) == (2, 2, 16, 64)
