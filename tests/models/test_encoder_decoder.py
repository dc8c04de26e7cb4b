"""The encoder-decoder against Vaswani et al. 2017 and T5 in numpy; visibility; initialization."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformer_reference as ref

from lm.models.encoder_decoder import EncoderDecoder
from lm.models.transformer_config import TransformerConfig

RNG = np.random.default_rng(1)
S, T = 60, 44  # long enough for the wide buckets of relative positions
SOURCE, TARGET = RNG.integers(0, 96, (1, S)), RNG.integers(0, 96, (1, T))
# Two pairs and padding in one row.
SOURCE_SEGMENTS = np.repeat([1, 2, 0], [40, 15, 5])[None]
TARGET_SEGMENTS = np.repeat([1, 2, 0], [12, 30, 2])[None]
SOURCE_AT, TARGET_AT = np.r_[:40, :15, [0] * 5][None], np.r_[:12, :30, 0, 0][None]
PAIRS = [(slice(0, 40), slice(0, 12)), (slice(40, 55), slice(12, 42))]
ROW = (SOURCE, TARGET, SOURCE_SEGMENTS, TARGET_SEGMENTS, SOURCE_AT, TARGET_AT)

TRANSFORMER_2017 = {
    "norm_placement": "post", "norm_eps": 1e-6, "positions": "sinusoidal", "activation": "relu",
    "attention_bias": "none", "scale_embeddings": True,
}  # fmt: skip
T5 = {
    "norm": "rmsnorm", "norm_eps": 1e-6, "bias": False, "positions": "relative",
    "attention_scale": 1.0,
}  # fmt: skip
T5_1_0 = T5 | {"activation": "relu", "scale_logits": True}
T5_1_1 = T5 | {"activation": "geglu", "tie_embeddings": False}


@functools.cache
def _make(changes):
    sizes = {
        "n_layers": 2, "n_decoder_layers": 3, "d_model": 32, "n_heads": 6, "n_kv_heads": 6,
        "head_dim": 8, "d_ff": 64, "vocab_size": 96, "max_length": 64,
    }  # fmt: skip
    model = EncoderDecoder(TransformerConfig(**sizes | dict(changes)))
    return model, ref.draw(model, *ROW)


def make(**changes):
    return _make(tuple(sorted(changes.items())))


def transformer_2017(params, source, target):
    """Vaswani et al. 2017, §3 and §5.1: one matrix for both embeddings and the output."""
    p, norm = ref.float64(params), functools.partial(ref.layer_norm, eps=1e-6)
    table = p["tokens"]["embedding"]
    width = table.shape[1]

    def embed(tokens):
        angles = np.arange(len(tokens))[:, None] / 10_000 ** (np.arange(0, width, 2) / width)
        x = table[tokens] * np.sqrt(width)
        x[:, 0::2] += np.sin(angles)
        x[:, 1::2] += np.cos(angles)
        return x

    def feed_forward(x, layer):
        f = layer["feed_forward"]
        y = ref.project(np.maximum(ref.project(x, f["in"]), 0), f["out"])
        return norm(x + y, layer["feed_forward_norm"])

    z = embed(source)
    for layer in ref.layers(p["encoder"]):
        z = norm(z + ref.attention(layer["attention"], z, z), layer["attention_norm"])
        z = feed_forward(z, layer)
    x = embed(target)
    for layer in ref.layers(p["decoder"]):
        y = ref.attention(layer["attention"], x, x, causal=True)
        x = norm(x + y, layer["attention_norm"])
        y = ref.attention(layer["cross_attention"], x, z)
        x = norm(x + y, layer["cross_attention_norm"])
        x = feed_forward(x, layer)
    return x @ table.T


def t5(params, source, target, gated=False):
    """Raffel et al. 2020, §2.1; gated: version 1.1, with an output matrix of its own."""
    p, norm = ref.float64(params), functools.partial(ref.rms_norm, eps=1e-6)
    attention = functools.partial(ref.attention, scaled=False)

    def feed_forward(x, layer):
        f, y = layer["feed_forward"], norm(x, layer["feed_forward_norm"])
        wide = ref.project(y, f["in"])
        wide = ref.gelu_tanh(ref.project(y, f["gate"])) * wide if gated else np.maximum(wide, 0)
        return x + ref.project(wide, f["out"])

    z = p["tokens"]["embedding"][source]
    bias = ref.t5_bias(p["encoder"]["relative_bias"]["embedding"], len(z), causal=False)
    for layer in ref.layers(p["encoder"]):
        y = norm(z, layer["attention_norm"])
        z = feed_forward(z + attention(layer["attention"], y, y, bias=bias), layer)
    z = norm(z, p["encoder"]["final_norm"])
    x = p["tokens"]["embedding"][target]
    bias = ref.t5_bias(p["decoder"]["relative_bias"]["embedding"], len(x), causal=True)
    for layer in ref.layers(p["decoder"]):
        y = norm(x, layer["attention_norm"])
        x = x + attention(layer["attention"], y, y, causal=True, bias=bias)
        x = x + attention(layer["cross_attention"], norm(x, layer["cross_attention_norm"]), z)
        x = feed_forward(x, layer)
    x = norm(x, p["decoder"]["final_norm"])
    if gated:
        return x @ p["head"]["kernel"]
    return x / np.sqrt(x.shape[-1]) @ p["tokens"]["embedding"].T


REFERENCES = {
    "2017": (transformer_2017, TRANSFORMER_2017),
    "t5-1.0": (t5, T5_1_0),
    "t5-1.1": (functools.partial(t5, gated=True), T5_1_1),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_logits_match_the_paper(name):
    reference, changes = REFERENCES[name]
    model, params = make(**changes)
    found = jax.jit(model.apply)({"params": params}, *ROW)[0]
    for source, target in PAIRS:
        expected = reference(params, SOURCE[0, source], TARGET[0, target])
        np.testing.assert_allclose(found[target], expected, atol=3e-5 * abs(expected).max())


@pytest.mark.parametrize("positions", ["relative", "sinusoidal"])
def test_targets_depend_only_on_their_source_and_past(positions):
    model, params = make(**T5_1_1 | {"positions": positions})
    table = jnp.asarray(params["tokens"]["embedding"])
    # Distinct tokens in source and target: the gradient of a row is that of its vector.
    source, target = np.arange(S)[None] % 55, 55 + np.arange(41)[None]
    segments = TARGET_SEGMENTS[:, :41]

    def hidden(table):
        edited = params | {"tokens": {"embedding": table}}
        inputs = (source, target, SOURCE_SEGMENTS, segments)
        return model.apply({"params": edited}, *inputs, method="decoder_hidden")[0]

    weights = jax.random.normal(jax.random.key(0), (41, 32))
    pull = jax.vjp(hidden, table)[1]
    jacobian = jax.jit(lambda: jax.lax.map(lambda at: pull(at[:, None] * weights)[0], jnp.eye(41)))
    found = (np.asarray(jacobian()) != 0).any(-1)
    own = segments[0][:, None]
    np.testing.assert_array_equal(found[:, :55], own == SOURCE_SEGMENTS[0, :55])
    np.testing.assert_array_equal(found[:, 55:], np.tril(own == segments[0]))


def test_text_to_classify_is_input_of_encoder_and_decoder():
    """Lewis et al. 2020, §3.1: the decoder's vector of the last token stands for the text."""
    model, params = make(**TRANSFORMER_2017)
    tokens, segments = SOURCE[:, :20], (np.arange(20) < 14)[None].astype(int)

    def run(model):
        x = model.hidden(tokens, None, segments)
        return x, model.logits(x), model.pooled(x, segments)

    x, logits, pooled = model.apply({"params": params}, method=run)
    expected = transformer_2017(params, tokens[0, :14], tokens[0, :14])
    np.testing.assert_allclose(logits[0, :14], expected, atol=3e-5 * abs(expected).max())
    np.testing.assert_array_equal(pooled, x[:, 13])


def initial_deviations(**changes):
    model, _ = make(
        d_model=256, n_heads=8, n_kv_heads=8, head_dim=64, d_ff=1024, vocab_size=500,
        scale_residual_init=False, **changes,
    )  # fmt: skip
    params = jax.jit(lambda: nn.meta.unbox(model.init(jax.random.key(0), *ROW))["params"])()
    flat = jax.tree.leaves_with_path(params)
    return {"/".join(part.key for part in path): float(np.std(x)) for path, x in flat}


def assert_close(found, expected):
    for name, deviation in expected.items():
        rel = 0.1 if "relative" in name else 0.02
        assert found[name] == pytest.approx(deviation, rel=rel), name


def test_t5_starts_as_its_code_does():
    """mesh-tensorflow's deviations: what attention does not divide by is in that of its queries."""
    found = initial_deviations(**T5_1_1, init="fan_in", init_std=1.0)
    d, inner, ff = 256, 8 * 64, 1024
    block = {
        "query/kernel": (d * 64) ** -0.5,
        "key/kernel": d**-0.5,
        "value/kernel": d**-0.5,
        "out/kernel": inner**-0.5,
    }
    layers = "decoder/layers"
    assert_close(
        found,
        {
            "tokens/embedding": 1.0,
            "head/kernel": d**-0.5,
            "encoder/relative_bias/embedding": d**-0.5,
            "decoder/relative_bias/embedding": d**-0.5,
            **{f"{layers}/attention/{name}": std for name, std in block.items()},
            **{f"{layers}/cross_attention/{name}": std for name, std in block.items()},
            f"{layers}/feed_forward/gate/kernel": d**-0.5,
            f"{layers}/feed_forward/in/kernel": d**-0.5,
            f"{layers}/feed_forward/out/kernel": ff**-0.5,
        },
    )


def test_transformer_of_2017_starts_as_its_code_does():
    """tensor2tensor's: Glorot's deviations (2010, eq. 16), d^-0.5 for the shared matrix."""
    found = initial_deviations(**TRANSFORMER_2017, init="xavier", init_std=256**-0.5)
    attention, feed_forward = (2 / (256 + 8 * 64)) ** 0.5, (2 / (256 + 1024)) ** 0.5
    assert_close(
        found,
        {
            "tokens/embedding": 256**-0.5,
            "encoder/layers/attention/query/kernel": attention,
            "encoder/layers/attention/out/kernel": attention,
            "decoder/layers/cross_attention/key/kernel": attention,
            "encoder/layers/feed_forward/in/kernel": feed_forward,
            "encoder/layers/feed_forward/out/kernel": feed_forward,
        },
    )
