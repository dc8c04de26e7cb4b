import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

MIXES = {
    "gpt2": {},
    "llama": {
        "positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "n_kv_heads": 2,
        "bias": False, "tie_embeddings": False,
    },
    "2017": {"positions": "sinusoidal", "norm_placement": "post", "activation": "relu"},
    "none": {
        "positions": "none", "norm": "rmsnorm", "norm_placement": "post", "activation": "geglu",
        "n_kv_heads": 1,
    },
    "alibi": {"positions": "alibi", "n_heads": 6, "n_kv_heads": 3, "head_dim": 8, "bias": False},
    "wide heads": {
        "positions": "rotary", "norm_bias": False, "activation": "gelu_erf", "head_dim": 16,
        "n_kv_heads": 2, "attention": "tiled", "scan_unroll": 0, "rope_scaling": "yarn",
        "rope_factor": 4.0, "rope_original_length": 8, "rope_high_frequency": 32.0,
    },
    "gemma 3": {
        "positions": "rotary", "norm": "rmsnorm", "norm_unit_offset": True,
        "norm_placement": "both", "activation": "geglu", "n_kv_heads": 2, "bias": False,
        "qk_norm": True, "attention_scale": 0.3, "attention_softcap": 2.0, "logit_softcap": 3.0,
        "n_layers": 5, "window": 3, "global_every": 2, "rope_theta": 500.0,
        "rope_theta_local": 20.0, "rope_scaling": "linear", "rope_factor": 4.0,
    },
    "olmo 3 with experts": {
        "positions": "rotary", "norm": "rmsnorm", "norm_placement": "output", "bias": False,
        "activation": "swiglu", "n_kv_heads": 2, "qk_norm": True, "qk_norm_over": "all",
        "n_layers": 4, "window": 3, "global_every": 2, "rope_theta_local": 20.0,
        "rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_length": 8,
        "n_experts": 3, "expert_weights": "probability", "expert_d_ff": 12, "dense_layers": 1,
        "shared_expert_d_ff": 10, "shared_expert_gate": True,
    },
    "gpt-oss": {
        "positions": "rotary", "norm": "rmsnorm", "activation": "swiglu_clipped", "n_kv_heads": 2,
        "attention_sinks": True, "n_layers": 2, "window": 3, "global_every": 2, "n_experts": 3,
        "router_bias": True, "rope_scaling": "yarn", "rope_factor": 4.0, "rope_fraction": 0.5,
        "rope_original_length": 8, "rope_high_frequency": 32.0,
    },
    "llama 4, granite": {
        "positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "n_kv_heads": 2,
        "bias": False, "n_layers": 4, "window": 5, "window_chunks": True, "global_every": 2,
        "nope_every": 2, "nope_temperature": 0.5, "nope_temperature_length": 3, "rope_norm": True,
        "n_experts": 3, "router_scores": "sigmoid", "expert_weights_input": True,
        "residual_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 3.0,
    },
    "sinks in tiles": {
        "attention_sinks": True, "attention_gate": True, "attention": "tiled", "n_kv_heads": 2,
    },
}  # fmt: skip
LENGTH, PREFILL = 12, 6
LENGTHS = np.array([4, 6, 1])  # of the prompts, padded on the left to PREFILL
TOKENS = np.random.default_rng(0).integers(0, 48, (3, LENGTH))


@pytest.fixture(params=MIXES)
def mix(request, make_model):
    return make_model(**MIXES[request.param])


def decode(model, params, tokens, positions, segments):
    """Logits of PREFILL tokens at once, then of one token at a time, through the cache."""
    step = jax.jit(functools.partial(model.apply, {"params": params}, method="decode"))
    cache = model.empty_cache(len(tokens), tokens.shape[1])
    chunks = [slice(0, PREFILL)] + [slice(i, i + 1) for i in range(PREFILL, tokens.shape[1])]
    logits = []
    for chunk in chunks:
        out, cache = step(tokens[:, chunk], positions[:, chunk], segments[:, chunk], cache)
        logits.append(out)
    return np.concatenate(logits, axis=1)


def test_cached_decoding_gives_the_full_forward_pass(mix):
    model, params = mix
    full = jax.jit(model.apply)({"params": params}, TOKENS)
    positions = np.broadcast_to(np.arange(LENGTH), TOKENS.shape)
    cached = decode(model, params, TOKENS, positions, np.ones_like(TOKENS))
    np.testing.assert_allclose(cached, full, atol=1e-5)


def test_left_padded_rows_give_the_full_forward_pass(mix):
    model, params = mix
    full = np.asarray(jax.jit(model.apply)({"params": params}, TOKENS))
    pads = PREFILL - LENGTHS
    width = LENGTH + pads.max()
    positions = np.arange(width) - pads[:, None]
    segments = (positions >= 0).astype(int)
    positions = np.clip(positions, 0, LENGTH - 1)
    padded = np.take_along_axis(TOKENS, positions, axis=1)
    cached = decode(model, params, padded, positions, segments)
    for row, pad in enumerate(pads):
        np.testing.assert_allclose(cached[row, pad : pad + LENGTH], full[row], atol=1e-5)


def test_step_writes_the_cache_in_place(make_model):
    """Of four layers in a loop, only one at a time is copied for reading."""
    model, params = make_model(n_layers=4, scan_unroll=1)
    cache = jax.eval_shape(lambda: model.empty_cache(2, 4096))
    tokens = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    step = jax.jit(functools.partial(model.apply, method="decode"), donate_argnums=4)
    lowered = step.lower({"params": params}, tokens, tokens, tokens, cache)
    needed = lowered.compile().memory_analysis()
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.mixers))
    assert needed.alias_size_in_bytes >= size
    assert needed.temp_size_in_bytes < 0.5 * size


def test_cache_counts_and_does_not_change_its_shape(make_model):
    model, params = make_model(n_kv_heads=2, dtype=jnp.bfloat16)
    cache = model.empty_cache(3, LENGTH)
    apply = jax.jit(functools.partial(model.apply, method="decode"))
    positions = np.broadcast_to(np.arange(5), (3, 5))
    _, after = apply({"params": params}, TOKENS[:, :5], positions, np.ones((3, 5), int), cache)
    assert cache.index == 0
    assert after.index == 5
    before, now = (jax.tree.map(lambda x: (x.shape, x.dtype), c) for c in (cache, after))
    assert before == now
    assert [x.shape for x in jax.tree.leaves(after.mixers)] == 2 * [(2, 3, 2, LENGTH, 8)]
    np.testing.assert_array_equal(after.segment_ids_BS[:, :5], 1)
    np.testing.assert_array_equal(after.segment_ids_BS[:, 5:], 0)
