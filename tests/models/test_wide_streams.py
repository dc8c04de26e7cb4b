"""Hyper-connections and value residuals against their papers, in numpy, and in decoding."""

import dataclasses
import functools

import flax.linen as nn
import jax
import numpy as np
import pytest
import scipy.special
from transformer_reference import float64, gelu_tanh, layer_norm, layers, project

from lm.models.variables import flat, nested

TOKENS = np.random.default_rng(0).integers(0, 96, (2, 12))
HYPER = {"residual": "hyper", "hyper_streams": 3}
CASES = {
    "dynamic": HYPER,
    "static": HYPER | {"hyper_dynamic": False},
    "values": {"value_residual": "learned"},
    "fixed values, streams": HYPER | {"value_residual": "fixed"},
}


def connections(layer, name, H, k, n):
    """A_m [L, n], A_r [L, n, n] and B [L, n] of sublayer k (Zhu et al. 2024, eq. 10 to 14)."""
    p = layer[f"{name}_connection"]
    static = np.concatenate([np.eye(n)[:, [k % n]], np.eye(n), np.ones((n, 1))], 1) + p["static"]
    weights = np.broadcast_to(static, (len(H), n, n + 2))
    if "dynamic" in p:
        s_alpha, s_beta = p["scale"]
        turned = np.tanh(layer_norm(H, p["norm"], 1e-5) @ p["dynamic"]["kernel"])
        weights = weights + turned * np.array([s_alpha] * (n + 1) + [s_beta])
    return weights[:, :, 0], weights[:, :, 1:-1], weights[:, :, -1]


def attend(a, x, first, weights):
    """Causal attention, and its own values, mixed with the first layer's by `weights`."""
    q, k, v = (project(x, a[name]) for name in ("query", "key", "value"))
    mixed = v if first is None or weights is None else weights[0] * first + weights[1] * v
    scores = np.einsum("qhk,shk->hqs", q, k) / np.sqrt(q.shape[-1])
    scores[:, ~np.tril(np.ones(scores.shape[1:], bool))] = -np.inf
    o = np.einsum("hqs,shk->qhk", scipy.special.softmax(scores, axis=-1), mixed)
    return np.tensordot(o, a["out"]["kernel"], 2) + a["out"]["bias"], v


def reference(params, tokens, n, value_residual):
    """One sequence through n streams, or one that is a sum: GPT-2's blocks."""
    p = float64(params)
    x = p["tokens"]["embedding"][tokens] + p["positions"]["embedding"][: len(tokens)]
    H, first = np.stack([x] * (n or 1), 1), None
    for number, layer in enumerate(layers(p["stack"])):
        lambdas = {"none": None, "fixed": (0.5, 0.5)}.get(
            value_residual, layer.get("value_weights")
        )
        for i, name in enumerate(("attention", "feed_forward")):
            ones = np.ones((len(H), 1))
            a_m, a_r, b = ones, ones[:, None], ones
            if n:
                a_m, a_r, b = connections(layer, name, H, 2 * number + i, n)
            h = layer_norm(np.einsum("li,lid->ld", a_m, H), layer[f"{name}_norm"], 1e-5)
            if name == "attention":
                y, v = attend(layer["attention"], h, first, lambdas)
                first = v if first is None else first
            else:
                f = layer["feed_forward"]
                y = project(gelu_tanh(project(h, f["in"])), f["out"])
            H = np.einsum("lij,lid->ljd", a_r, H) + b[..., None] * y[:, None]
    return layer_norm(H.sum(1), p["stack"]["final_norm"], 1e-5) @ p["tokens"]["embedding"].T


@pytest.mark.parametrize("case", CASES)
def test_decoder_computes_what_the_papers_say_also_with_a_cache(make_model, case):
    changes = CASES[case]
    model, params = make_model(**changes, n_layers=3)
    full = np.asarray(jax.jit(model.apply)({"params": params}, TOKENS))
    n = changes.get("hyper_streams", 0)
    for row, tokens in enumerate(TOKENS):
        expected = reference(params, tokens, n, changes.get("value_residual", "none"))
        np.testing.assert_allclose(full[row], expected, rtol=2e-3, atol=2e-3)
    step = jax.jit(functools.partial(model.apply, {"params": params}, method="decode"))
    cache, logits = model.empty_cache(2, 12), []
    positions = np.broadcast_to(np.arange(12), (2, 12))
    for chunk in (slice(0, 6), slice(6, 7), slice(7, 12)):
        ones = np.ones_like(TOKENS[:, chunk])
        out, cache = step(TOKENS[:, chunk], positions[:, chunk], ones, cache)
        logits.append(np.asarray(out))
    np.testing.assert_allclose(np.concatenate(logits, axis=1), full, rtol=1e-3, atol=1e-3)


def test_fresh_hyper_connections_are_a_plain_residual_sum(make_model):
    """Eq. 14: as initialized, n streams of the plain model's blocks give its logits."""
    plain, params = make_model()
    config = dataclasses.replace(plain.config, **HYPER)
    model = plain.clone(config=config)
    fresh = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), TOKENS)["params"])
    merged = nested(flat(fresh) | flat(params))
    found = model.apply({"params": merged}, TOKENS)
    expected = plain.apply({"params": params}, TOKENS)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
