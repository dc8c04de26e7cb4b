"""Running layers unrolled or with remat changes neither parameter layout nor results."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

# scan_unroll, remat; against (1, "none")
WAYS = [(0, "none"), (1, "dots"), (0, "full"), (1, "offload_dots"), (1, "offload")]
TOKENS = np.random.default_rng(0).integers(0, 48, (2, 16))


def boxed_shapes(model):
    return jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]


@functools.cache
def loss_of(model):
    def loss(params, tokens):
        log_probabilities = jax.nn.log_softmax(model.apply({"params": params}, tokens))
        return -(log_probabilities[:, :-1] * jax.nn.one_hot(tokens[:, 1:], 96)).sum()

    return jax.jit(jax.value_and_grad(loss))


def program(model, params):
    """The training program before XLA removes any of it; a scanned layer is written once."""
    return loss_of(model).lower(params, TOKENS).as_text()


@pytest.mark.parametrize(("unroll", "remat"), WAYS)
def test_there_is_one_parameter_layout(make_model, unroll, remat):
    model, _ = make_model(scan_unroll=unroll, remat=remat)
    plain, _ = make_model()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), boxed_shapes(model)) == jax.tree.map(
        lambda x: (x.shape, x.dtype), boxed_shapes(plain)
    )
    assert nn.get_partition_spec(boxed_shapes(model)) == nn.get_partition_spec(boxed_shapes(plain))


def test_layers_are_the_first_axis_of_every_stacked_parameter(make_model):
    model, params = make_model()
    names = nn.get_partition_spec(boxed_shapes(model))
    stacked = jax.tree.leaves(params["stack"]["layers"])
    assert all(leaf.shape[0] == 2 for leaf in stacked)
    assert all(spec[0] == "layers" for spec in jax.tree.leaves(names["stack"]["layers"]))
    deep, _ = make_model(n_layers=5)
    assert jax.tree.structure(params) == jax.tree.structure(nn.meta.unbox(boxed_shapes(deep)))


@pytest.mark.parametrize(("unroll", "remat"), WAYS)
def test_loss_and_gradients_are_the_same(make_model, unroll, remat):
    plain, params = make_model()
    model, _ = make_model(scan_unroll=unroll, remat=remat)
    loss, grads = loss_of(model)(params, TOKENS)
    expected_loss, expected_grads = loss_of(plain)(params, TOKENS)
    assert loss == pytest.approx(float(expected_loss), rel=1e-6)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5 * float(abs(y).max()) + 1e-6),
        grads,
        expected_grads,
    )


def test_gradient_of_a_large_batch_is_the_sum_over_its_rows(make_model):
    """XLA compiles large arrays differently, and sometimes wrongly (jax-ml/jax#39103)."""
    model, params = make_model(positions="rotary", norm="rmsnorm", attention="tiled")
    tokens = np.random.default_rng(0).integers(0, 96, (64, 80))
    loss = loss_of(model)
    total, grads = loss(params, tokens)
    parts = [loss(params, tokens[i : i + 4]) for i in range(0, 64, 4)]
    assert float(total) == pytest.approx(sum(float(part) for part, _ in parts), rel=1e-5)
    summed = jax.tree.map(lambda *x: sum(np.float64(y) for y in x), *(grad for _, grad in parts))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4 * abs(y).max() + 1e-3),
        grads,
        summed,
    )


def test_remat_recomputes_what_it_says(make_model):
    """ "dots" keeps the products of activations with weights, "full" keeps none."""
    none, dots, full = (
        program(*make_model(remat=remat)).count("dot_general") for remat in ("none", "dots", "full")
    )
    assert none < dots < full


@pytest.mark.parametrize("remat", ["full", "offload_dots", "offload"])
def test_offloading_keeps_values_in_the_memory_of_the_host(make_model, remat):
    model, params = make_model(remat=remat)
    traced = str(jax.make_jaxpr(loss_of(model))(params, TOKENS))
    assert ("host" in traced) == (remat != "full")


def test_only_unrolled_layers_are_no_loop(make_model):
    assert "while" in program(*make_model())
    assert "while" not in program(*make_model(scan_unroll=0))


def test_program_does_not_grow_with_depth(make_model):
    shallow, deep = (program(*make_model(n_layers=n)).count("dot_general") for n in (2, 5))
    assert shallow == deep


def test_initial_values_do_not_depend_on_how_layers_run(make_model):
    first, second = (
        jax.jit(make_model(**ways)[0].init)(jax.random.key(3), TOKENS)
        for ways in ({}, {"scan_unroll": 0, "remat": "full"})
    )
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_layers_draw_different_dropout(make_model):
    """Two layers add 1 to every channel, with dropout: 0, 1 or 2 remain, not 0 or 2."""
    model, params = make_model(dropout=0.5, norm="rmsnorm", tie_embeddings=False, vocab_size=32)
    params = jax.tree.map(np.zeros_like, params)
    params["stack"]["layers"]["attention"]["out"]["bias"] += 1
    params["stack"]["final_norm"]["scale"] += 1
    params["head"]["kernel"] += np.eye(32, dtype=np.float32)
    training, rngs = model.clone(deterministic=False), {"dropout": jax.random.key(0)}
    x = np.asarray(training.apply({"params": params}, TOKENS % 32, rngs=rngs))
    shares = [np.mean(np.isclose(x, n * x.max(-1, keepdims=True) / 2)) for n in (0, 1, 2)]
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], atol=0.05)


@pytest.mark.parametrize("final", [False, True])
def test_dropout_after_the_final_norm_is_an_option(make_model, final):
    """Raffel 2020, §2.1; without it the norm gives no zeros."""
    model, params = make_model(dropout=0.5, final_dropout=final)
    _, sown = model.clone(deterministic=False).apply(
        {"params": params},
        TOKENS,
        rngs={"dropout": jax.random.key(0)},
        capture_intermediates=lambda module, _: module.name == "stack",
    )
    x_BLD, _ = sown["intermediates"]["stack"]["__call__"][0]
    assert float((x_BLD == 0).mean()) == pytest.approx(0.5 if final else 0.0, abs=0.03)
