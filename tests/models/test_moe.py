"""Mixtures of experts against their papers: outputs, gradients, dropping, losses, decoding."""

import functools
from dataclasses import replace

import flax.linen as nn
import jax
import numpy as np
import pytest
from moe_reference import mixture
from transformer_reference import draw, float64

from lm.models import moe
from lm.models.decoder import Decoder
from lm.models.expert_choice import choose_experts
from lm.models.experts_config import ExpertsConfig
from lm.models.moe import MixtureOfExperts
from lm.models.transformer_config import TransformerConfig

E, D, B, L = 4, 8, 2, 12
CONFIG = TransformerConfig(
    n_layers=1, d_model=D, n_heads=2, n_kv_heads=2, head_dim=4, d_ff=6, vocab_size=32,
    max_length=L, n_experts=E, experts_per_token=1, activation="relu",
)  # fmt: skip
STYLES = {
    "switch": {},
    "mixtral": {"activation": "swiglu", "experts_per_token": 2, "bias": False},
    "three": {"experts_per_token": 3, "expert_weights": "probability", "expert_d_ff": 5},
    "qwen2": {
        "activation": "swiglu", "experts_per_token": 2, "expert_weights": "probability",
        "shared_expert_d_ff": 7, "shared_expert_gate": True, "bias": False,
    },
    "one, normalized": {"expert_weights": "normalized", "shared_expert_d_ff": 7},
}  # fmt: skip
X = np.float32(np.random.default_rng(1).normal(size=(B, L, D)))


def make(deterministic=True, **changes):
    layer = MixtureOfExperts(replace(CONFIG, **changes), deterministic)
    return layer, draw(layer, X)


@functools.cache
def program(layer):
    return jax.jit(functools.partial(layer.apply, mutable=["losses", "metrics"]))


def run(layer, params, x=X, **inputs):
    """The layer's outputs, and what it reported, by name."""
    y, reported = program(layer)({"params": params}, x, **inputs)
    return np.asarray(y), {n: v for kind in reported.values() for n, (v,) in kind.items()}


def test_router_bias_chooses_but_does_not_weigh():
    """Wang et al. 2024 (arXiv 2408.15664), eq. 3: top-k of s + b, weights of s alone."""
    rng = np.random.default_rng(3)
    logits, bias = rng.normal(size=(2, 5, E)), np.array([0.5, -0.5, 0.0, 0.1])
    config = ExpertsConfig(experts_per_token=2)
    experts, weights = choose_experts(config, np.float32(logits), np.float32(bias))
    scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.argsort(-(scores + bias), axis=-1)[..., :2]
    np.testing.assert_array_equal(experts, expected)
    picked = np.exp(np.take_along_axis(logits, expected, -1))
    np.testing.assert_allclose(weights, picked / picked.sum(-1, keepdims=True), rtol=1e-5)
    plain, _ = choose_experts(config, np.float32(logits))
    assert (np.asarray(plain) != expected).any()


def test_training_step_moves_the_router_bias_towards_even_loads():
    """Algorithm 1: b_i += u sign(mean load - load_i), padding not counted."""
    layer, params = make(deterministic=False, router_bias_rate=0.25, experts_per_token=2)
    state = {"model_state": {"router_bias": np.float32([0.0, 1.0, 0.0, -1.0])}}
    is_token = np.arange(L) < np.array([L, L // 2])[:, None]
    apply = functools.partial(layer.apply, mutable=["model_state", "losses", "metrics"])
    _, after = jax.jit(apply)({"params": params, **state}, X, is_token_BL=is_token)
    router = np.float64(params["router"]["kernel"])
    scores = np.exp(X @ router) / np.exp(X @ router).sum(-1, keepdims=True)
    chosen = np.argsort(-(scores + state["model_state"]["router_bias"]), -1)[..., :2]
    load = np.bincount(chosen[is_token].ravel(), minlength=E)
    assert load.max() > load.min()
    expected = state["model_state"]["router_bias"] + 0.25 * np.sign(load.mean() - load)
    np.testing.assert_array_equal(after["model_state"]["router_bias"], np.float32(expected))
    unchanged, _ = layer.apply({"params": params, **state}, X, mutable=["losses", "metrics"])
    assert unchanged.shape == X.shape


@pytest.mark.parametrize(("scores", "n_best"), [("softmax", 1), ("sigmoid", 2)])
def test_experts_come_from_the_best_groups(scores, n_best):
    """DeepSeek-V2, §2.2.2, and V3's released code, one token at a time: 12 experts, 4 groups."""
    rng = np.random.default_rng(4)
    logits, bias = rng.normal(size=(2, 5, 12)), rng.normal(0, 0.3, 12)
    config = ExpertsConfig(
        experts_per_token=3, expert_groups=4, expert_groups_per_token=2, expert_weights_scale=2.5,
        expert_group_best=n_best, router_scores=scores, expert_weights="normalized",
    )  # fmt: skip
    experts, weights = choose_experts(config, np.float32(logits), np.float32(bias))
    for at in np.ndindex(2, 5):
        z = logits[at]
        s = 1 / (1 + np.exp(-z)) if scores == "sigmoid" else np.exp(z) / np.exp(z).sum()
        of_groups = np.sort((s + bias).reshape(4, 3))[:, -n_best:].sum(-1)
        is_open = np.isin(np.arange(12) // 3, np.argsort(-of_groups)[:2])
        expected = np.argsort(-np.where(is_open, s + bias, -np.inf))[:3]
        np.testing.assert_array_equal(experts[at], expected)
        weight = 2.5 * s[expected] / s[expected].sum()
        np.testing.assert_allclose(weights[at], weight, rtol=1e-5)


@pytest.mark.parametrize("capacity", [0.0, 0.75], ids=["dropless", "capacity"])
@pytest.mark.parametrize("style", STYLES)
def test_outputs_match_one_token_at_a_time(style, capacity):
    layer, params = make(deterministic=False, expert_capacity=capacity, **STYLES[style])
    k, how = layer.config.experts_per_token, layer.config.expert_weights
    room = capacity and int(np.ceil(capacity * k * L / E))
    found, reported = run(layer, params)
    for row, y, dropped in zip(X, found, reported["dropped"], strict=True):
        expected, queues = mixture(float64(params), np.float64(row), k, room or None, how=how)
        np.testing.assert_allclose(y, expected, atol=2e-6)
        served = sum(map(len, queues.values()))
        assert dropped == pytest.approx(1 - served / (k * L), abs=1e-6)
        assert not capacity or served < k * L  # something is dropped
        assert capacity or served == k * L


@pytest.mark.parametrize("capacity", [0.0, 0.75], ids=["dropless", "capacity"])
@pytest.mark.parametrize("style", STYLES)
def test_gradients_are_the_slopes_of_the_reference(style, capacity):
    """Along random directions of every parameter and the input, by differences in float64."""
    layer, params = make(deterministic=False, expert_capacity=capacity, **STYLES[style])
    k, how = layer.config.experts_per_token, layer.config.expert_weights
    room = int(np.ceil(capacity * k * L / E)) if capacity else None
    rng = np.random.default_rng(2)
    out = rng.normal(size=X.shape)

    def reference(params, x):
        rows = (mixture(params, row, k, room, how=how)[0] for row in x)
        return sum((row * o).sum() for row, o in zip(rows, out, strict=True))

    grads = jax.jit(jax.grad(lambda p, x: (layer.apply({"params": p}, x) * out).sum(), (0, 1)))(
        params, X
    )
    values, grads = (float64(params), np.float64(X)), float64(grads)
    leaves, tree = jax.tree.flatten(values)
    for i, (leaf, grad) in enumerate(zip(leaves, jax.tree.leaves(grads), strict=True)):
        direction = rng.normal(size=leaf.shape)
        moved = (
            reference(*tree.unflatten([*leaves[:i], leaf + h * direction, *leaves[i + 1 :]]))
            for h in (1e-6, -1e-6)
        )
        slope = (next(moved) - next(moved)) / 2e-6
        assert (grad * direction).sum() == pytest.approx(slope, rel=1e-4, abs=1e-4)


def test_full_expert_takes_the_first_tokens_of_the_row():
    """Switch, figure 3: tokens that come to a full expert pass it by."""
    experts = np.array([[[0], [1], [0], [0], [2], [0], [1]], [[2], [2], [2], [2], [2], [2], [0]]])
    places = moe.queue_positions(experts, 3)[..., 0]
    assert places.tolist() == [[0, 0, 1, 2, 0, 3, 1], [0, 1, 2, 3, 4, 5, 0]]
    assert moe.expert_capacity(1.0, 7, 1, 3) == 3  # 7/3, rounded up
    assert moe.expert_capacity(1.5, 6, 1, 3) == 3  # figure 3
    assert moe.expert_capacity(2.0, 6, 2, 2) == 6  # a token comes to an expert once


def test_first_choices_come_before_second_ones():
    experts = np.array([[[0, 1], [1, 0], [0, 1]]])
    assert moe.queue_positions(experts, 2).tolist() == [[[0, 1], [0, 2], [1, 2]]]


def test_dropless_output_is_the_mixture_of_the_chosen_experts():
    """Computed the other way round: every expert of every token, most of them times 0."""
    layer, params = make(experts_per_token=2)
    p = float64(params)
    logits = X @ p["router"]["kernel"]
    smallest = np.sort(logits)[..., -2:-1]
    odds = np.where(logits >= smallest, np.exp(logits), 0)
    h = np.einsum("bld,edf->blef", X, p["experts"]["in"]["kernel"]) + p["experts"]["in"]["bias"]
    y = np.einsum("blef,efd->bled", np.maximum(h, 0), p["experts"]["out"]["kernel"])
    y = y + p["experts"]["out"]["bias"]
    expected = np.einsum("ble,bled->bld", odds / odds.sum(-1, keepdims=True), y)
    np.testing.assert_allclose(run(layer, params)[0], expected, atol=2e-6)


def test_capacity_that_cannot_overflow_is_dropless():
    roomy, params = make(deterministic=False, experts_per_token=2, expert_capacity=float(E))
    dropless, _ = make(experts_per_token=2)
    np.testing.assert_allclose(run(roomy, params)[0], run(dropless, params)[0], atol=1e-6)


def test_evaluation_drops_nothing():
    training, params = make(deterministic=False, expert_capacity=0.25)
    evaluation, _ = make(expert_capacity=0.25)
    assert run(training, params)[1]["dropped"].min() > 0.5
    assert run(evaluation, params)[1]["dropped"].max() == 0


def test_padding_uses_no_capacity_and_does_not_count():
    layer, params = make(deterministic=False, expert_capacity=0.5)
    is_token = np.arange(L) >= np.array([[0], [5]])
    x = np.where(is_token[..., None], X, X[0, 0])  # padding all wants the same expert
    y, reported = run(layer, params, x, is_token_BL=is_token)
    assert not y[~is_token].any()
    expected, _ = mixture(float64(params), np.float64(x[1]), 1, 2, is_token[1])
    np.testing.assert_allclose(y[1], expected, atol=2e-6)
    plain = make()[0]
    _, alone = run(plain, params, x[1:, 5:])
    for name in ("balance_loss", "router_z_loss", "busiest_expert"):
        assert reported[name][1] == pytest.approx(float(alone[name][0]), rel=1e-5), name


def test_balance_loss_by_hand():
    """Switch, eq. 4 to 6: two experts, three tokens, probabilities 3/4, 1/2 + and 1/4 of the first.

    f = (2/3, 1/3), P = (1/2, 1/2): 2 (2/3 · 1/2 + 1/3 · 1/2) = 1; were all three as the first
    token, f = (1, 0) and P = (3/4, 1/4): 2 · 3/4 = 3/2.
    """
    p = np.array([[0.75, 0.5 + 1e-6, 0.25], [0.75, 0.75, 0.75]])
    logits = np.log(np.stack([p, 1 - p], -1))
    tokens = np.ones((2, 3), bool)
    experts, weights = choose_experts(ExpertsConfig(experts_per_token=1), logits)
    np.testing.assert_allclose(weights[..., 0], np.maximum(p, 1 - p), rtol=1e-5)
    load = moe.expert_load(experts, tokens, 2)
    np.testing.assert_allclose(load, [[2 / 3, 1 / 3], [1, 0]], rtol=1e-6)
    softmax = jax.nn.softmax
    found = moe.balance_loss(softmax(logits), load, tokens)
    np.testing.assert_allclose(found, [1, 1.5], rtol=1e-5)
    # Only the mean probabilities have a gradient: E f_i dP_i.
    slope = jax.grad(lambda z: moe.balance_loss(softmax(z), load, tokens).sum())(logits)
    softmax_slope = (p * (1 - p))[1, 0]
    np.testing.assert_allclose(slope[1, 0], 2 / 3 * softmax_slope * np.array([1, -1]), rtol=1e-5)


def test_both_choices_count_in_the_load():
    experts = np.array([[[0, 1], [0, 2]]])
    load = moe.expert_load(experts, np.ones((1, 2), bool), 4)
    np.testing.assert_allclose(load, [[0.5, 0.25, 0.25, 0]])


def test_z_loss_by_hand():
    """ST-MoE, eq. 5: logits (0, 0) and (ln 3, 0) have log-partitions ln 2 and ln 4."""
    logits = np.array([[[0.0, 0.0], [np.log(3), 0.0]]])
    expected = (np.log(2) ** 2 + np.log(4) ** 2) / 2
    found = moe.router_z_loss(logits, np.ones((1, 2), bool))
    np.testing.assert_allclose(found, [expected], rtol=1e-6)


def test_jitter_acts_in_training_only():
    layer, params = make(router_jitter=0.3)
    assert (run(layer, params)[0] == run(make()[0], params)[0]).all()
    train = jax.jit(layer.clone(deterministic=False).apply)
    one, again, other = (
        train({"params": params}, X, rngs={"dropout": jax.random.key(seed)}) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, again)
    assert abs(one - other).max() > 1e-2


TOKENS = np.random.default_rng(0).integers(0, 32, (3, L))


@pytest.fixture(scope="module")
def alternating():
    config = replace(
        CONFIG, n_layers=4, experts_every=2, experts_per_token=2, expert_capacity=0.5,
        positions="rotary", n_kv_heads=1,
    )  # fmt: skip
    model = Decoder(config)
    return model, draw(model, TOKENS)


def test_last_of_every_few_layers_has_experts(alternating):
    _, params = alternating
    plain, sparse = (params["stack"]["layers"][f"{i}_of_2"]["feed_forward"] for i in (0, 1))
    assert plain["in"]["kernel"].shape == (2, D, 6)
    assert sparse["experts"]["in"]["kernel"].shape == (2, E, D, 6)
    assert sparse["router"]["kernel"].shape == (2, D, E)


def test_results_do_not_depend_on_scan_or_remat(alternating):
    model, params = alternating
    config = replace(model.config, scan_unroll=0, remat="full")
    other = Decoder(config, deterministic=False)

    def loss(model):
        @jax.jit
        @jax.value_and_grad
        def loss(params):
            logits, reported = model.apply({"params": params}, TOKENS, mutable=["losses"])
            return (logits**2).sum() + sum(x.sum() for x in jax.tree.leaves(reported))

        return loss(params)

    shapes = jax.eval_shape(other.init, jax.random.key(0), TOKENS)["params"]
    assert jax.tree.structure(nn.meta.unbox(shapes)) == jax.tree.structure(params)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4),
        loss(other),
        loss(model.clone(deterministic=False)),
    )


def test_cached_decoding_gives_the_full_forward_pass(alternating):
    """Nothing is dropped, though a capacity of half the even share drops in training."""
    model, params = alternating
    full = jax.jit(model.apply)({"params": params}, TOKENS)
    step = jax.jit(functools.partial(model.apply, {"params": params}, method="decode"))
    cache = model.empty_cache(*TOKENS.shape)
    positions = np.broadcast_to(np.arange(L), TOKENS.shape)
    logits = []
    for chunk in [slice(0, 6), *(slice(i, i + 1) for i in range(6, L))]:
        ones = np.ones_like(TOKENS[:, chunk])
        out, cache = step(TOKENS[:, chunk], positions[:, chunk], ones, cache)
        logits.append(out)
    np.testing.assert_allclose(np.concatenate(logits, axis=1), full, atol=1e-5)
    training = model.clone(deterministic=False)
    assert abs(jax.jit(training.apply)({"params": params}, TOKENS) - full).max() > 0.1
