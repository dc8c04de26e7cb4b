"""The whole decoder against its papers, written in numpy; its precision and its initialization."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

TOKENS = np.random.default_rng(0).integers(0, 48, (2, 16))


def layers(params):
    """The parameters of each block in turn, float64."""
    stacked = jax.tree.map(lambda x: np.asarray(x, np.float64), params["stack"]["layers"])
    n_layers = len(jax.tree.leaves(stacked)[0])
    return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(n_layers)]


def float64(params):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


def layer_norm(x, p, eps=1e-5):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * p["scale"] + p["bias"]


def rms_norm(x, p, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * p["scale"]


def attend(q, k, v):
    """One sequence: q, k, v are [length, heads, width], as many key as query heads."""
    scores = np.einsum("qhk,shk->hqs", q, k) / np.sqrt(q.shape[-1])
    scores[:, ~np.tril(np.ones(scores.shape[1:], bool))] = -np.inf
    return np.einsum("hqs,shk->qhk", scipy.special.softmax(scores, axis=-1), v)


def project(x, p):
    """x times a kernel whose outputs may be several dimensions, and the bias if there is one."""
    return np.tensordot(x, p["kernel"], 1) + p.get("bias", 0)


def merge(o, p):
    return np.tensordot(o, p["kernel"], 2) + p.get("bias", 0)


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gpt2(params, tokens):
    """Radford et al. 2019 after Radford et al. 2018: pre-norm, biases, tanh-gelu, tied head."""
    p = float64(params)
    x = p["tokens"]["embedding"][tokens] + p["positions"]["embedding"][: len(tokens)]
    for layer in layers(params):
        a, f = layer["attention"], layer["feed_forward"]
        y = layer_norm(x, layer["attention_norm"])
        x = x + merge(attend(*(project(y, a[n]) for n in ("query", "key", "value"))), a["out"])
        y = layer_norm(x, layer["feed_forward_norm"])
        x = x + project(gelu_tanh(project(y, f["in"])), f["out"])
    return layer_norm(x, p["stack"]["final_norm"]) @ p["tokens"]["embedding"].T


def llama(params, tokens, theta=500.0, eps=1e-6):
    """Touvron et al. 2023: RMSNorm, rotary positions, SwiGLU, grouped heads, no biases, a head."""
    p = float64(params)

    def turn(x):
        half = x.shape[-1] // 2
        angles = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)
        z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
        return np.concatenate([z.real, z.imag], axis=-1)

    x = p["tokens"]["embedding"][tokens]
    for layer in layers(params):
        a, f = layer["attention"], layer["feed_forward"]
        y = rms_norm(x, layer["attention_norm"], eps)
        q, k, v = (project(y, a[n]) for n in ("query", "key", "value"))
        repeats = q.shape[1] // k.shape[1]
        k, v = np.repeat(turn(k), repeats, axis=1), np.repeat(v, repeats, axis=1)
        x = x + merge(attend(turn(q), k, v), a["out"])
        y = rms_norm(x, layer["feed_forward_norm"], eps)
        gate = project(y, f["gate"])
        x = x + project(gate * scipy.special.expit(gate) * project(y, f["in"]), f["out"])
    return rms_norm(x, p["stack"]["final_norm"], eps) @ p["head"]["kernel"]


def transformer_2017(params, tokens):
    """The decoder of Vaswani et al. 2017 without its encoder: post-norm, sinusoids, relu."""
    p = float64(params)
    width = p["tokens"]["embedding"].shape[1]
    angles = np.arange(len(tokens))[:, None] / 10_000 ** (np.arange(0, width, 2) / width)
    x = p["tokens"]["embedding"][tokens]
    x[:, 0::2] += np.sin(angles)
    x[:, 1::2] += np.cos(angles)
    for layer in layers(params):
        a, f = layer["attention"], layer["feed_forward"]
        y = merge(attend(*(project(x, a[n]) for n in ("query", "key", "value"))), a["out"])
        x = layer_norm(x + y, layer["attention_norm"])
        y = project(np.maximum(project(x, f["in"]), 0), f["out"])
        x = layer_norm(x + y, layer["feed_forward_norm"])
    return x @ p["tokens"]["embedding"].T


REFERENCES = {
    gpt2: {},
    llama: {
        "norm": "rmsnorm", "norm_eps": 1e-6, "positions": "rotary", "rope_theta": 500.0,
        "activation": "swiglu", "n_kv_heads": 2, "bias": False, "tie_embeddings": False,
    },
    transformer_2017: {
        "norm_placement": "post", "positions": "sinusoidal", "activation": "relu",
    },
}  # fmt: skip


@pytest.mark.parametrize("kernel", ["xla", "tiled"])
@pytest.mark.parametrize("reference", REFERENCES, ids=lambda reference: reference.__name__)
def test_logits_match_the_paper(make_model, reference, kernel):
    model, params = make_model(**REFERENCES[reference], attention=kernel)
    tokens = np.random.default_rng(1).integers(0, 96, (2, 80))
    logits = jax.jit(model.apply)({"params": params}, tokens)
    expected = [reference(params, row) for row in tokens]
    np.testing.assert_allclose(logits, expected, atol=3e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16_computes_in_bfloat16_and_keeps_parameters_and_logits_float32(make_model, tied):
    full, params = make_model(tie_embeddings=tied)
    model, _ = make_model(tie_embeddings=tied, dtype=jnp.bfloat16)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    run = jax.jit(model.apply)
    logits = run({"params": params}, TOKENS)
    assert logits.dtype == jnp.float32
    exact = jax.jit(full.apply)({"params": params}, TOKENS)
    assert 1e-3 < abs(logits - exact).max() < 0.05 * abs(exact).max()
    grads = jax.eval_shape(jax.grad(lambda p: model.apply({"params": p}, TOKENS).sum()), params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(grads))
    products = [
        line
        for line in run.lower({"params": params}, TOKENS).as_text().splitlines()
        if "dot_general" in line
    ]
    assert products
    for line in products:  # operands (bf16, bf16), sums f32
        operands, result = line.rsplit(" : ", 1)[1].split("->")
        assert "xf32" not in operands, line
        assert "xf32" in result, line


@pytest.mark.parametrize("scaled", [True, False])
def test_initial_deviations(make_model, scaled):
    model, _ = make_model(
        d_model=192, head_dim=48, d_ff=192, vocab_size=200, max_length=200, n_layers=3,
        tie_embeddings=False, activation="geglu", scale_residual_init=scaled,
    )  # fmt: skip
    init = jax.jit(lambda: nn.meta.unbox(model.init(jax.random.key(0), TOKENS[:1]))["params"])
    flat = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(init())}
    drawn = {}  # one entry a layer
    for name, x in flat.items():
        if name.endswith("['scale']"):
            assert (x == 1).all(), name
        elif name.endswith("['bias']"):
            assert (x == 0).all(), name
        else:
            for i, part in enumerate(x if "layers" in name else [x]):
                drawn[f"{name} {i}"] = np.asarray(part).ravel()
    assert len(drawn) == 3 * (4 + 3) + 3
    for name, x in drawn.items():
        residual = scaled and "['out']['kernel']" in name
        expected = 0.02 / np.sqrt(2 * 3) if residual else 0.02
        assert x.std() == pytest.approx(expected, rel=0.02), name
        assert abs(x.mean()) < expected / 30, name
    similarity = np.corrcoef([x[:30_000] for x in drawn.values()])  # no two start equal
    assert abs(similarity - np.eye(len(drawn))).max() < 0.1


def test_dropout_acts_in_training_only(make_model):
    model, params = make_model(dropout=0.3, attention_dropout=0.3)
    clean, _ = make_model()

    @jax.jit
    def train(key):
        training = model.clone(deterministic=False)
        return training.apply({"params": params}, TOKENS, rngs={"dropout": key})

    evaluation = jax.jit(model.apply)({"params": params}, TOKENS)
    np.testing.assert_array_equal(evaluation, jax.jit(clean.apply)({"params": params}, TOKENS))
    one, again, other = (train(jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert abs(one - other).max() > 0.1
    assert abs(one - evaluation).max() > 0.1
