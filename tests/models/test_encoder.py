"""The encoder against BERT and RoBERTa in numpy: hidden vectors, masked words, next sentences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformer_reference as ref

from lm.models.encoder import Encoder
from lm.models.transformer_config import TransformerConfig

L = 24
RNG = np.random.default_rng(1)
TOKENS, TYPES = RNG.integers(0, 96, (2, L)), RNG.integers(0, 2, (2, L))
# Two documents and padding in the first row, one document in the second.
SEGMENTS = np.stack([np.repeat([1, 2, 0], [9, 11, 4]), np.ones(L, int)])
POSITIONS = np.stack([np.r_[:9, :11, [0] * 4], np.r_[:L]])
DOCUMENTS = [(0, slice(0, 9)), (0, slice(9, 20)), (1, slice(0, L))]

BERT = {
    "norm_placement": "post", "norm_eps": 1e-12, "embedding_norm": True, "token_types": 2,
    "activation": "gelu_erf",
}  # fmt: skip
ROBERTA = BERT | {"norm_eps": 1e-5, "token_types": 1, "position_offset": 2}


@functools.cache
def _make(changes):
    config = TransformerConfig(
        n_layers=3, d_model=32, n_heads=4, n_kv_heads=4, head_dim=8, d_ff=64, vocab_size=96,
        max_length=40, n_classes=3, **dict(changes),
    )  # fmt: skip
    model = Encoder(config)
    return model, ref.draw(model, TOKENS, TYPES, SEGMENTS, method=everything)


def make(**changes):
    return _make(tuple(sorted(changes.items())))


def everything(model, tokens, types, segments, positions=None):
    """Hidden vectors and all that is made of them."""
    x = model.hidden(tokens, positions, segments, types)
    pooled = model.pooled(x, segments)
    return {
        "hidden": x,
        "words": model.logits(x),
        "next": model.next_sentence(pooled),
        "class": model.classify(pooled),
        "span": model.spans(x),
    }


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, *inputs):
    return model.apply({"params": params}, *inputs, method=everything)


def bert(config, params, tokens, types):
    """Devlin et al. 2018 of one document; the heads are those of the released code."""
    p, norm = ref.float64(params), functools.partial(ref.layer_norm, eps=config.norm_eps)
    first = config.position_offset
    x = p["tokens"]["embedding"][tokens] + p["types"]["embedding"][types]
    x = norm(x + p["positions"]["embedding"][first : first + len(x)], p["embedding_norm"])
    for layer in ref.layers(p["stack"]):
        x = norm(x + ref.attention(layer["attention"], x, x), layer["attention_norm"])
        wide = ref.gelu(ref.project(x, layer["feed_forward"]["in"]))
        y = ref.project(wide, layer["feed_forward"]["out"])
        x = norm(x + y, layer["feed_forward_norm"])
    changed = norm(ref.gelu(ref.project(x, p["transform"])), p["transform_norm"])
    pooled = np.tanh(ref.project(x[0], p["pooler"]))
    return {
        "hidden": x,
        "words": changed @ p["tokens"]["embedding"].T + p["logit_bias"]["bias"],
        "next": ref.project(pooled, p["sentence_head"]),
        "class": ref.project(pooled, p["classifier"]),
        "span": ref.project(x, p["span_head"]),
    }


@pytest.mark.parametrize("changes", [BERT, ROBERTA], ids=["bert", "roberta"])
def test_every_output_matches_the_paper(changes):
    model, params = make(**changes)
    types = TYPES if changes is BERT else np.zeros_like(TYPES)
    found = run(model, params, TOKENS, types, SEGMENTS, POSITIONS)
    for row, at in DOCUMENTS:
        expected = bert(model.config, params, TOKENS[row, at], types[row, at])
        for name in ("hidden", "words", "span"):
            np.testing.assert_allclose(found[name][row, at], expected[name], atol=2e-5)
        if at.start == 0:  # what is made of a row's first token
            for name in ("next", "class"):
                np.testing.assert_allclose(found[name][row], expected[name], atol=2e-5)


def test_text_may_be_the_mean_of_its_tokens():
    """Reimers and Gurevych 2019, §3: of those that are no padding, without a layer on top."""
    model, params = make(**BERT, pooling="mean")
    assert "pooler" not in params
    found = run(model, params, TOKENS, TYPES, SEGMENTS, POSITIONS)
    for row, hidden in enumerate(np.asarray(found["hidden"], np.float64)):
        mean = hidden[SEGMENTS[row] != 0].mean(0)
        expected = ref.project(mean, ref.float64(params)["classifier"])
        np.testing.assert_allclose(found["class"][row], expected, atol=2e-5)


def test_positions_are_counted_where_they_are_not_given():
    model, params = make(**ROBERTA)
    found, given = (
        run(model, params, TOKENS, TYPES, np.ones_like(TOKENS), at)
        for at in (None, np.tile(np.arange(L), (2, 1)))
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found, given)


def test_single_type_matches_every_token():
    """Of a pair too: RoBERTa's table has one row, and its second text no type of its own."""
    model, params = make(**ROBERTA)
    pair, single = (
        run(model, params, TOKENS, types, SEGMENTS) for types in (TYPES, np.zeros_like(TYPES))
    )
    jax.tree.map(np.testing.assert_array_equal, pair, single)
    assert np.isfinite(pair["words"]).all()


def test_a_token_sees_all_of_its_document_and_nothing_else():
    model, params = make(**BERT, tie_embeddings=False, first_conv=3)
    table = jnp.asarray(params["tokens"]["embedding"])
    tokens = np.arange(L)[None]  # distinct: the gradient of a token's row is that of its vector

    def hidden(table):
        edited = params | {"tokens": {"embedding": table}}
        return model.apply({"params": edited}, tokens, None, SEGMENTS[:1], method="hidden")[0]

    weights = jax.random.normal(jax.random.key(0), (L, 32))
    pull = jax.vjp(hidden, table)[1]
    jacobian = jax.jit(lambda: jax.lax.map(lambda at: pull(at[:, None] * weights)[0], jnp.eye(L)))
    found = (np.asarray(jacobian()) != 0).any(-1)[:, :L]
    np.testing.assert_array_equal(found, SEGMENTS[0][:, None] == SEGMENTS[0])


def test_parts_that_a_loss_does_not_use_have_no_parameters():
    model, _ = make(**BERT)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    heads = {"pooler", "sentence_head", "classifier", "span_head"}
    assert not heads & shapes.keys()
    assert {"transform", "transform_norm", "logit_bias"} <= shapes.keys()
