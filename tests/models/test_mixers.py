"""Registered token mixers work in the unchanged block, each with its own cache."""

import functools
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config.registries import MIXERS, SCHEMA, LatentAttentionOptions, MambaOptions
from lm.config.registry import option
from lm.models.attention import TokenMixer, attend
from lm.models.cache import write_layer
from lm.models.decoder import Decoder
from lm.models.mamba import MambaCache
from lm.models.transformer_config import LayerType, TransformerConfig

TINY = TransformerConfig(
    n_layers=4, d_model=32, n_heads=4, n_kv_heads=4, head_dim=8, d_ff=64, vocab_size=96,
    max_length=96,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 96, (3, 12))
LENGTHS = np.array([4, 6, 1])  # of prompts padded on the left to 6


@dataclass(frozen=True)
class LatentOptions:
    latent_rank: int = option(6, "Width of the cached latent of a token.", low=1)


class LatentAttention(TokenMixer):
    """Keys and values from a cached latent [B, S, R] (DeepSeek-V2, arXiv 2405.04434, §2.1)."""

    @classmethod
    def init_cache(cls, config, n_layers, batch, length):
        return jnp.zeros((n_layers, batch, length, config.mixer_options.latent_rank), config.dtype)

    @nn.compact
    def __call__(self, x_BLW, inputs, cache, layer):
        c = self.config
        heads = functools.partial(nn.DenseGeneral, (c.n_heads, c.head_dim))
        latent_BSR = nn.Dense(c.mixer_options.latent_rank, name="down")(x_BLW)
        if cache is not None:
            cache, latent_BSR = write_layer(cache, layer, latent_BSR, inputs.mask.offset)
        k_BSHK, v_BSHK = heads(name="key")(latent_BSR), heads(name="value")(latent_BSR)
        o_BLHK = attend(
            heads(name="query")(x_BLW), k_BSHK, v_BSHK, inputs.mask,
            kernel="xla", context_attention="", scale=c.score_scale,
        )  # fmt: skip
        return nn.DenseGeneral(c.d_model, axis=(-2, -1), name="out")(o_BLHK), cache


class LinearAttention(TokenMixer):
    """Causal attention without softmax, as a recurrence with state [B, H, K, K] (arXiv 2006.16236).

    Padding leaves the state as it is.
    """

    @classmethod
    def init_cache(cls, config, n_layers, batch, length):
        c = config
        return jnp.zeros((n_layers, batch, c.n_heads, c.head_dim, c.head_dim), jnp.float32)

    @nn.compact
    def __call__(self, x_BLW, inputs, cache, layer):
        c, segments_BL = self.config, inputs.mask.segments_BL
        heads = functools.partial(nn.DenseGeneral, (c.n_heads, c.head_dim))
        q_BLHK, k_BLHK, v_BLHK = (heads(name=name)(x_BLW) for name in ("query", "key", "value"))
        if segments_BL is not None:
            k_BLHK *= (segments_BL != 0)[..., None, None]
        states_BLHKK = jnp.cumsum(jnp.einsum("blhk,blhv->blhkv", k_BLHK, v_BLHK), axis=1)
        if cache is not None:
            states_BLHKK += cache[layer][:, None]
            cache, _ = write_layer(cache, layer, states_BLHKK[:, -1])
        o_BLHK = jnp.einsum("blhk,blhkv->blhv", q_BLHK, states_BLHKK)
        return nn.DenseGeneral(c.d_model, axis=(-2, -1), name="out")(o_BLHK), cache


@dataclass(frozen=True)
class HybridConfig(TransformerConfig):
    """Attention in every second layer, a recurrence in the others."""

    def layer_types(self, n_layers):
        return tuple(LayerType(mixer=("linear", "attention")[i % 2]) for i in range(n_layers))


@pytest.fixture(autouse=True)
def mixers():
    before = dict(MIXERS.entries)
    MIXERS.register("latent", options=LatentOptions)(LatentAttention)
    MIXERS.register("linear")(LinearAttention)
    yield
    MIXERS.entries.clear()
    MIXERS.entries.update(before)
    MIXERS.version += 1


FIELDS = {name: getattr(TINY, name) for name in TINY.__dataclass_fields__}
MLA = {
    "mixer": "mla",
    "positions": "rotary",
    "n_kv_heads": 4,
    "mixer_options": LatentAttentionOptions(
        q_lora_rank=10, kv_lora_rank=6, qk_nope_head_dim=4, v_head_dim=5, rope_interleaved=True
    ),
}
MAMBA = {
    "mixer": "mamba2",
    "positions": "none",
    "feed_forward": False,
    "mixer_options": MambaOptions(
        ssm_heads=4, ssm_head_dim=8, ssm_state=6, ssm_groups=2, ssm_chunk=5
    ),
}
CONFIGS = {
    "mamba": TransformerConfig(**FIELDS | MAMBA),
    "mamba hybrid": TransformerConfig(
        **FIELDS | MAMBA | {"attention_layers": (1, 3), "feed_forward": True}
    ),
    "gated delta": TransformerConfig(**FIELDS | MAMBA | {"mixer": "gated_delta"}),
    "mla": TransformerConfig(**FIELDS | MLA),
    "latent": TransformerConfig(**FIELDS | {"mixer": "latent", "mixer_options": LatentOptions()}),
    "linear": TransformerConfig(**FIELDS | {"mixer": "linear"}),
    "hybrid": HybridConfig(**FIELDS),
}


@pytest.fixture(params=CONFIGS)
def model(request):
    return Decoder(CONFIGS[request.param])


@pytest.fixture
def params(model):
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), TOKENS)["params"])
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: np.float32(rng.normal(0, 0.3, x.shape)), params)


def test_cached_decoding_gives_the_full_forward_pass(model, params):
    """Of rows padded on both sides, in chunks, with rows exchanged half-way as in a beam search."""
    full = np.asarray(jax.jit(model.apply)({"params": params}, TOKENS))
    step = jax.jit(functools.partial(model.apply, {"params": params}, method="decode"))
    pads = 6 - LENGTHS
    width = TOKENS.shape[1] + pads.max()
    positions = np.arange(width) - pads[:, None]
    segments = (positions >= 0).astype(int)
    positions = np.clip(positions, 0, TOKENS.shape[1] - 1)
    tokens = np.take_along_axis(TOKENS, positions, axis=1)
    tokens, positions, segments = (
        np.insert(x, [6, 6], 0, axis=1) for x in (tokens, positions, segments)
    )
    cache, order, logits = model.empty_cache(3, width + 2), np.arange(3), []
    for chunk in (slice(0, 8), *(slice(i, i + 1) for i in range(8, width)), slice(-2, None)):
        if chunk.start == 10:
            order = np.array([2, 2, 0])
            cache, logits = cache.take(order), [x[order] for x in logits]
        out, cache = step(*(x[order][:, chunk] for x in (tokens, positions, segments)), cache)
        logits.append(np.asarray(out))
    cached = np.delete(np.concatenate(logits, axis=1), [6, 7], axis=1)
    for row, source in enumerate(order):
        of_tokens = cached[row, pads[source] : pads[source] + TOKENS.shape[1]]
        np.testing.assert_allclose(of_tokens, full[source], rtol=1e-3, atol=1e-4)


def test_each_mixer_has_a_cache_for_its_own_layers(model):
    shapes = jax.tree.map(lambda x: x.shape, model.empty_cache(3, 7).mixers)
    linear, attention = (3, 4, 8, 8), (3, 4, 7, 8)

    def mamba(n, x="x", b="B", c="C"):
        taps = {x: (3, 3, 4, 8), b: (3, 3, 2, 6), c: (3, 3, 2, 6)}
        return MambaCache({k: (n, *s) for k, s in taps.items()}, (n, 3, 4, 8, 6), (n, 3))

    expected = {
        "mamba": {"mamba2": mamba(4)},
        "mamba hybrid": {"attention": ((2, *attention), (2, *attention)), "mamba2": mamba(2)},
        "gated delta": {"gated_delta": mamba(4, "v", "k", "q")},
        "latent": {"latent": (4, 3, 7, 6)},
        "mla": {"mla": ((4, 3, 1, 7, 6 + 8),)},  # of the latent and the rotated key
        "linear": {"linear": (4, *linear)},
        "hybrid": {"attention": ((2, *attention), (2, *attention)), "linear": (2, *linear)},
    }
    assert shapes == next(v for k, v in expected.items() if CONFIGS[k] is model.config)


def test_stack_of_two_mixers_is_scanned_by_period():
    model = Decoder(CONFIGS["hybrid"])
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    layers = nn.meta.unbox(shapes)["stack"]["layers"]
    assert list(layers) == ["0_of_2", "1_of_2"]
    assert all(x.shape[0] == 2 for x in jax.tree.leaves(layers))


def test_step_writes_every_cache_in_place():
    model = Decoder(CONFIGS["hybrid"])
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    cache = jax.eval_shape(lambda: model.empty_cache(2, 4096))
    tokens = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    step = jax.jit(functools.partial(model.apply, method="decode"), donate_argnums=4)
    lowered = step.lower({"params": nn.meta.unbox(params)}, tokens, tokens, tokens, cache)
    needed = lowered.compile().memory_analysis()
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.mixers))
    assert needed.alias_size_in_bytes >= size
    assert needed.temp_size_in_bytes < 0.7 * size  # one of the two layers with attention is read


def test_mixer_and_its_options_are_configurable():
    assert SCHEMA["model.latent_rank"].default == 6
    assert {"attention", "latent", "linear"} <= set(SCHEMA["model.mixer"].choices)
