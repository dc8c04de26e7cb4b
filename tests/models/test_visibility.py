"""Inputs that a logit depends on, determined from gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

L = 96  # more than one tile of the tiled kernel
# Distinct tokens and an untied head: the gradient of a token's row is that of its input vector.
TOKENS = jnp.arange(L)[None]
LENGTHS = (30, 45, 9, 12)  # of three documents and padding
SEGMENTS = np.repeat([1, 2, 3, 0], LENGTHS)
WITHIN = np.concatenate([np.arange(n) for n in LENGTHS])


def dependence(model, params, positions=None, segments=None, prefix=None):
    """[L, L] bool: whether any logit at t moves with the input vector at s."""

    def logits(table):
        edited = params | {"tokens": {"embedding": table}}
        return model.apply({"params": edited}, TOKENS, positions, segments, prefix)[0]

    table = params["tokens"]["embedding"]
    cotangent = jax.random.normal(jax.random.key(2), (L, model.config.vocab_size))

    @jax.jit
    def jacobian(table):
        pull = jax.vjp(logits, table)[1]
        # One after the other: under vmap, jaxlib 0.10.2 miscompiles the norm's gradient on CPUs
        # (github.com/jax-ml/jax/issues/39103).
        return jax.lax.map(lambda at: pull(at[:, None] * cotangent)[0], jnp.eye(L))

    return (np.asarray(jacobian(table)) != 0).any(-1)[:, :L]


@pytest.mark.parametrize("kernel", ["xla", "tiled"])
def test_logits_depend_only_on_the_past(make_model, kernel):
    model, params = make_model(tie_embeddings=False, attention=kernel, positions="rotary")
    np.testing.assert_array_equal(dependence(model, params), np.tril(np.ones((L, L), bool)))


@pytest.mark.parametrize("kernel", ["xla", "tiled"])
def test_logits_depend_only_on_their_document(make_model, kernel):
    model, params = make_model(tie_embeddings=False, attention=kernel, n_kv_heads=2)
    found = dependence(model, params, WITHIN[None], SEGMENTS[None])
    same = SEGMENTS[:, None] == SEGMENTS
    np.testing.assert_array_equal(found, np.tril(same))


@pytest.mark.parametrize(
    ("n_layers", "global_every", "reach"), [(1, 0, 9), (3, 0, 27), (3, 4, 27), (3, 2, L), (1, 1, L)]
)
def test_windows_of_10_reach_9_tokens_back_a_layer(make_model, n_layers, global_every, reach):
    model, params = make_model(
        n_layers=n_layers, window=10, global_every=global_every, tie_embeddings=False,
        positions="rotary", init_std=0.3,
    )  # fmt: skip
    found = dependence(model, params, WITHIN[None], SEGMENTS[None])
    distance = np.arange(L)[:, None] - np.arange(L)
    same = SEGMENTS[:, None] == SEGMENTS
    np.testing.assert_array_equal(found, same & (distance >= 0) & (distance <= reach))


@pytest.mark.parametrize("packed", [False, True])
def test_prefix_is_seen_by_all_of_its_document_and_the_rest_by_what_follows(make_model, packed):
    """Raffel 2020, figure 3: also by the prefix itself, and not by other documents."""
    segments, places = (SEGMENTS, WITHIN) if packed else (np.ones(L, int), np.arange(L))
    lengths = [0, 12, 45, 1] if packed else [0, 20]  # of each segment's prefix
    prefix = places < np.array(lengths)[segments]
    model, params = make_model(tie_embeddings=False, positions="rotary")
    found = dependence(model, params, places[None], segments[None], jnp.asarray(prefix)[None])
    same = segments[:, None] == segments
    np.testing.assert_array_equal(found, same & (np.tril(same) | prefix[None, :]))


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary", "alibi", "none"])
def test_packed_row_gives_what_its_documents_give_alone(make_model, positions):
    kernel = "xla" if positions == "alibi" else "tiled"
    model, params = make_model(positions=positions, attention=kernel)
    tokens = np.random.default_rng(0).integers(0, 48, L)
    apply = jax.jit(model.apply)
    packed = apply({"params": params}, tokens[None], WITHIN[None], SEGMENTS[None])[0]
    for segment in (1, 2, 3):
        at = segment == SEGMENTS
        alone = np.zeros(L, int)  # one compiled shape: the future of a document changes nothing
        alone[: at.sum()] = tokens[at]
        np.testing.assert_allclose(
            packed[at], apply({"params": params}, alone[None])[0, : at.sum()], atol=1e-5
        )
