"""Layers of several types in one stack: segments, a dense prefix, unrolled layers."""

import functools
from dataclasses import replace

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lm.models.decoder import Decoder
from lm.models.transformer_config import LayerType, segments

DENSE, EXPERTS = LayerType(), LayerType("experts")
LOCAL = LayerType(is_local=True)
UNROLLED = LayerType(scannable=False)
MIXES = {
    "dense prefix": {"n_layers": 5, "n_experts": 4, "dense_layers": 1, "experts_every": 2},
    "concat": {"n_layers": 3, "residual": "concat", "concat_width": 8},
    "concat, experts": {
        "n_layers": 3, "residual": "concat", "n_experts": 4, "dense_layers": 1,
        "norm_placement": "both", "positions": "rotary",
    },
    "concat, relative": {"residual": "concat", "positions": "relative", "mup_base_width": 16},
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 12))


def shapes(types):
    return [(s.name, s.first, len(s.period), s.n_repeats) for s in segments(tuple(types))]


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ([DENSE] * 4, [("layers", 0, 1, 4)]),
        ([DENSE, EXPERTS] * 3, [("layers", 0, 2, 3)]),
        ([DENSE, EXPERTS, EXPERTS], [("layers", 0, 3, 1)]),
        ([LOCAL, DENSE, LOCAL], [("layers", 0, 1, 3)]),  # a window is an array of the scan
        ([UNROLLED] * 3, [("layers", 0, 3, 1)]),
        (
            [DENSE] * 3 + [replace(EXPERTS, group=1)] * 4,
            [("layers_0", 0, 1, 3), ("layers_3", 3, 1, 4)],
        ),
        ([UNROLLED, DENSE, DENSE], [("layers_0", 0, 1, 1), ("layers_1", 1, 1, 2)]),
    ],
)
def test_stack_is_split_into_scannable_segments(types, expected):
    assert shapes(types) == expected


def test_dense_first_layers_are_a_separate_segment(make_model):
    _, params = make_model(**MIXES["dense prefix"])
    stack = params["stack"]
    assert stack["layers_0"]["feed_forward"]["in"]["kernel"].shape == (1, 32, 64)
    assert stack["layers_1"]["0_of_2"]["feed_forward"]["in"]["kernel"].shape == (2, 32, 64)
    experts = stack["layers_1"]["1_of_2"]["feed_forward"]["experts"]
    assert experts["in"]["kernel"].shape == (2, 4, 32, 64)


def test_each_block_of_concat_is_wider_than_the_one_before(make_model):
    _, params = make_model(**MIXES["concat"])
    for i in range(3):
        layer = params["stack"]["layers"][str(i)]
        assert layer["attention"]["query"]["kernel"].shape == (32 + 8 * i, 4, 8)
        assert layer["feed_forward"]["in"]["kernel"].shape == (32 + 8 * i + 32, 64)
        assert layer["concat"]["kernel"].shape == (32, 8)
    assert params["stack"]["output"]["kernel"].shape == (32 + 8 * 3, 32)


def test_concat_is_the_formula(make_model):
    """H^{l+1} = concat(H^l, h^l W): the columns of H^l stay, and W makes the new ones."""
    model, params = make_model(**MIXES["concat"])
    _, sown = model.apply({"params": params}, TOKENS, capture_intermediates=True)
    found = sown["intermediates"]["stack"]["layers"]
    before = sown["intermediates"]["__call__"] and model.apply(
        {"params": params}, TOKENS, method=lambda m, tokens: m.embed(tokens)[0]
    )
    for i in range(3):
        block = found[str(i)]
        h_BLD = block["attention"]["__call__"][0][0] + block["feed_forward"]["__call__"][0]
        kernel = params["stack"]["layers"][str(i)]["concat"]["kernel"]
        (after, _), _ = block["__call__"][0]
        expected = np.concatenate([before, h_BLD @ kernel], -1)
        np.testing.assert_allclose(after, expected, rtol=1e-4, atol=1e-4)
        before = after


@pytest.mark.parametrize("mix", MIXES)
def test_cached_decoding_gives_the_full_forward_pass(make_model, mix):
    model, params = make_model(**MIXES[mix])
    full = jax.jit(model.apply)({"params": params}, TOKENS)
    step = jax.jit(functools.partial(model.apply, {"params": params}, method="decode"))
    cache, logits = model.empty_cache(*TOKENS.shape), []
    positions = np.broadcast_to(np.arange(TOKENS.shape[1]), TOKENS.shape)
    for chunk in (slice(0, 5), slice(5, 6), slice(6, 12)):
        inputs = TOKENS[:, chunk], positions[:, chunk], np.ones_like(TOKENS[:, chunk])
        out, cache = step(*inputs, cache)
        logits.append(out)
    np.testing.assert_allclose(np.concatenate(logits, axis=1), full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mix", ["dense prefix", "concat"])
@pytest.mark.parametrize("ways", [{"remat": "full"}, {"scan_unroll": 0}])
def test_loss_and_gradients_do_not_depend_on_how_layers_run(make_model, mix, ways):
    plain, params = make_model(**MIXES[mix])
    other = Decoder(replace(plain.config, **ways))

    def loss(model):
        def of(params):
            logits = model.apply({"params": params}, TOKENS)
            return (jax.nn.log_softmax(logits) ** 2).mean()

        return jax.jit(jax.value_and_grad(of))(params)

    (loss_a, grads_a), (loss_b, grads_b) = loss(plain), loss(other)
    assert loss_a == pytest.approx(float(loss_b), rel=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * float(abs(b).max()) + 1e-6),
        grads_a,
        grads_b,
    )


def test_remat_of_unrolled_layers_recomputes(make_model):
    """XLA may not merge the second computation with the first: it needs a barrier."""
    plain, params = make_model(**MIXES["concat"])

    def program(model):
        def loss(p):
            return model.apply({"params": p}, TOKENS).sum()

        return jax.jit(jax.grad(loss)).lower(params).as_text()

    remat = program(Decoder(replace(plain.config, remat="full")))
    assert remat.count("dot_general") > program(plain).count("dot_general")
    assert "optimization_barrier" in remat


def test_parameters_of_all_layers_have_axis_names(make_model):
    for mix in MIXES.values():
        model, params = make_model(**mix)
        boxed = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
        specs = jax.tree.leaves(
            nn.get_partition_spec(boxed), is_leaf=lambda x: isinstance(x, PartitionSpec)
        )
        for leaf, spec in zip(jax.tree.leaves(params), specs, strict=True):
            assert leaf.ndim == len(spec)
