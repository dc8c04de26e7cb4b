"""Readings of a text equal the model's own numbers, and attributions add up to differences."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import default, fill_defaults, set_value
from lm.insight.reading import Passage, read
from lm.models.transformer_config import make_model

TINY = {
    "model.n_layers": 2,
    "model.d_model": 16,
    "model.d_ff": 24,
    "model.n_heads": 4,
    "model.n_kv_heads": 2,
    "model.head_dim": 4,
    "model.vocab_size": 40,
    "model.max_length": 24,
    "model.init_std": 0.3,
}
KINDS = {
    "decoder": {
        "model.positions": "rotary",
        "model.window": 3,
        "model.global_every": 2,
        "model.residual": "concat",
        "model.concat_width": 6,
        "model.n_experts": 2,  # every token has both: no choice that jumps
        "train.remat": "full",
    },
    "encoder": {"model.family": "encoder", "model.norm_placement": "post"},
    "encoder_decoder": {"model.family": "encoder_decoder", "model.positions": "relative"},
}
TOKENS, SOURCE = (np.array(x, np.int32) for x in ([5, 9, 33, 2, 17, 9, 4], [8, 7, 30, 1]))


@pytest.fixture(scope="module", params=KINDS)
def known(request):
    """A random model, a passage, its reading, and the passage's log-likelihoods by hand."""
    config = default()
    for path, value in (TINY | KINDS[request.param]).items():
        set_value(config, path, value)
    model = make_model(fill_defaults(config, "cpu"), "xla", "")
    of_source = request.param == "encoder_decoder"
    inputs = (SOURCE[None], TOKENS[None]) if of_source else (TOKENS[None],)
    variables = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), *inputs))
    params = {**variables["params"]}
    positions = np.arange(len(TOKENS), dtype=np.int32)
    targets = np.array([*TOKENS[1:], -1], np.int32)
    passage = Passage(TOKENS, positions, targets, SOURCE if of_source else None)
    if request.param == "encoder":
        positions = positions[1:-1]
        passage = Passage(TOKENS, positions, TOKENS[1:-1], mask=3)

    tokens_QL = np.tile(TOKENS, (len(passage.positions), 1))
    if passage.mask >= 0:
        tokens_QL[np.arange(len(tokens_QL)), passage.positions] = passage.mask

    def log_likelihoods(scale_source, scale):
        """Of each prediction, with the embedding of every token multiplied by a factor."""
        factors = [scale_source, scale] if of_source else [scale]

        def interceptor(method, args, kwargs, context):
            found = method(*args, **kwargs)
            if context.method_name != "embed":
                return found
            return found[0] * left.pop(0)[None, :, None], found[1]

        left = list(factors)
        with nn.intercept_methods(interceptor):
            several = [jnp.tile(x, (len(tokens_QL), 1)) for x in inputs[:-1]]
            logits = model.apply({"params": params}, *several, tokens_QL)
        at = np.arange(len(tokens_QL)), passage.positions
        logits = jax.nn.log_softmax(logits[at])
        return jnp.where(passage.targets < 0, logits.max(-1), logits[at[0], passage.targets])

    experiment = SimpleNamespace(model=model)
    return SimpleNamespace(
        kind=request.param,
        passage=passage,
        found=read(experiment, params, passage),
        log_likelihoods=jax.jit(log_likelihoods),
        ones=(jnp.ones(len(SOURCE)), jnp.ones(len(TOKENS))),
    )


def test_losses_and_the_lens_of_the_last_layer_are_the_models(known):
    found = known.found.predictions
    expected = -known.log_likelihoods(*known.ones)
    np.testing.assert_allclose(found.scores.loss, expected, atol=1e-5)
    np.testing.assert_allclose(found.lens.loss[:, -1], expected, atol=1e-5)
    np.testing.assert_array_equal(found.lens.ids[:, -1], found.scores.ids[:, :3])
    assert found.lens.loss.shape == (len(expected), 3)
    unlike = np.abs(found.lens.loss[:, 0] - found.lens.loss[:, -1])
    assert unlike.max() > 1e-2


def test_rank_counts_more_likely_ids(known):
    found = known.found.predictions
    targets = known.passage.targets
    for q, target in enumerate(targets):
        likelier = found.scores.ids[q].tolist()
        if target < 0:
            assert found.scores.rank[q] == 1
        elif target in likelier:
            assert found.scores.rank[q] == 1 + likelier.index(target)
        else:
            assert found.scores.rank[q] > len(likelier)


def test_attribution_is_the_derivative_by_the_size_of_each_embedding(known):
    source, own = known.ones
    found, size = known.found.predictions, 0.01
    parts = [(found.attribution, 1)]
    if found.source_attribution is not None:
        parts.append((found.source_attribution, 0))
    for attribution, part in parts:
        for s in range(attribution.shape[1]):
            change = jnp.zeros_like((source, own)[part]).at[s].set(size)
            pair = [[source, own], [source, own]]
            pair[0][part] += change
            pair[1][part] -= change
            above, below = (known.log_likelihoods(*x) for x in pair)
            expected = (above - below) / (2 * size)
            np.testing.assert_allclose(attribution[:, s], expected, atol=2e-3, rtol=1e-2)
        assert np.abs(attribution).max() > 1e-2


def test_rows_of_attention_sum_to_1_and_see_what_the_mask_shows(known):
    arrays = known.found.arrays
    maps = {path: x for path, x in arrays.items() if path.endswith("attention")}
    assert len(maps) == (3 if known.kind == "encoder_decoder" else 1)
    for path, weights_NHLS in maps.items():
        assert weights_NHLS.shape[:2] == (2, 4)
        np.testing.assert_allclose(weights_NHLS.sum(-1), 1, atol=1e-5)
        later = np.triu(weights_NHLS, 1).any()
        assert later == (known.kind == "encoder" or path not in ("attention", "decoder/attention"))


def test_windows_match_the_layers(known):
    if known.kind == "decoder":  # the first layer sees three tokens, the second all before
        local, everything = known.found.arrays["attention"]
        far = np.subtract.outer(np.arange(len(TOKENS)), np.arange(len(TOKENS))) >= 3
        assert not local[..., far].any()
        assert everything[..., far].all()


def test_norms_add_up(known):
    """The stream after a layer is at most as long as before it and all that is added."""
    arrays = known.found.arrays
    prefix = "decoder/" if known.kind == "encoder_decoder" else ""
    residual, updates = arrays[f"{prefix}residual"], arrays[f"{prefix}updates"]
    assert residual.shape == (3, len(TOKENS))
    assert updates.shape == (2, 3 if prefix else 2, len(TOKENS))
    if known.kind == "encoder_decoder":  # a sum, not normalized after each layer
        assert (residual[1:] <= residual[:-1] + updates.sum(1) + 1e-5).all()


@pytest.mark.parametrize("multi_label", [False, True])
def test_class_is_predicted_from_the_whole_text(multi_label):
    config = default()
    values = {"model.n_layers": 1, "model.family": "encoder", "model.n_classes": 3}
    values |= {"objective.name": "classification", "data.labels": "x,y,z"}
    for path, value in (TINY | values).items():
        set_value(config, path, value)
    model = make_model(fill_defaults(config, "cpu"), "xla", "")

    def scores(model, scale=1.0):
        def scaled(method, args, kwargs, context):
            found = method(*args, **kwargs)
            is_embedded = context.method_name == "embed"
            return (found[0] * scale, found[1]) if is_embedded else found

        with nn.intercept_methods(scaled):
            x_BLD = model.hidden(TOKENS[None], None, np.ones((1, len(TOKENS)), np.int32))
        return model.classify(model.pooled(x_BLD, np.ones((1, len(TOKENS)), np.int32)))[0]

    variables = nn.meta.unbox(jax.jit(partial(model.init, method=scores))(jax.random.key(0)))
    of_class = {"classes": ("x", "y", "z"), "multi_label": multi_label}
    passage = Passage(TOKENS, *np.array([[0], [-1]], np.int32), **of_class)
    reading = read(SimpleNamespace(model=model), variables["params"], passage)
    found = reading.predictions

    @jax.jit
    @jax.value_and_grad
    def most_likely(scale):
        logits = model.apply(variables, scale, method=scores)
        return (jax.nn.log_sigmoid if multi_label else jax.nn.log_softmax)(logits).max()

    expected, derivative = most_likely(1.0)
    np.testing.assert_allclose(found.scores.loss, [-expected], atol=1e-5)
    np.testing.assert_allclose(found.lens.loss[:, -1], [-expected], atol=1e-5)
    np.testing.assert_allclose(found.attribution.sum(), derivative, atol=1e-4)
