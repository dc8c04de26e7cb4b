"""Multi-head latent attention: heads of two widths in every kernel, rules, and choices."""

from contextlib import nullcontext
from dataclasses import replace

import jax
import numpy as np
import pytest

from lm import config as configs
from lm.config.registries import LatentAttentionOptions
from lm.errors import UserError
from lm.experiment import resolve
from lm.models.attention import choose_attention
from lm.models.decoder import Decoder
from lm.parallel.mesh import AXES, axis_sizes, make_mesh, use_mesh

TOKENS = np.random.default_rng(0).integers(0, 96, (2, 128))
SEGMENTS = np.broadcast_to(1 + (np.arange(128) >= 50), TOKENS.shape)


@pytest.mark.parametrize("value_width", [5, 20])
def test_kernels_whose_heads_have_one_width(make_model, value_width):
    """Values, or queries and keys, are filled up with zeros: 4 + 8 beside 5 or 20."""
    options = LatentAttentionOptions(
        q_lora_rank=10, kv_lora_rank=6, qk_nope_head_dim=4, v_head_dim=value_width
    )
    model, params = make_model(mixer="mla", positions="rotary", mixer_options=options)

    def run(kernel, mesh):
        own = Decoder(replace(model.config, attention=kernel))

        def loss(params):
            return (own.apply({"params": params}, TOKENS, None, SEGMENTS) ** 2).mean()

        with use_mesh(mesh) if mesh else nullcontext():
            return jax.jit(jax.value_and_grad(loss))(params)

    expected = run("xla", None)
    one = make_mesh(axis_sizes("custom", {}, 1), jax.devices()[:1])
    for kernel, mesh in (("tiled", None), ("blockwise", one)):
        jax.tree.map(
            lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-4, atol=1e-5 * abs(e).max()),
            run(kernel, mesh),
            expected,
        )


def resolved(**changes):
    config = configs.default()
    values = {"mixer": "mla", "positions": "rotary", "n_heads": 4, "head_dim": 64} | changes
    for name, value in values.items():
        config.model[name] = value
    configs.validate(config)
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_kv_heads": 2}, "n_kv_heads=2"),
        ({"qk_norm": True}, "qk_norm"),
        ({"family": "lstm"}, "mixer=mla is not supported with .*lstm"),
        ({"n_experts": 6, "expert_groups": 4, "expert_groups_per_token": 1}, "not divisible"),
        ({"n_experts": 8, "expert_groups": 4}, "expert_groups_per_token=0"),
        (
            {"n_experts": 8, "expert_groups": 4, "expert_groups_per_token": 1}
            | {"experts_per_token": 3},
            "experts_per_token=3 is above",
        ),
    ],
)
def test_conflicting_options_are_one_line_errors(changes, message):
    with pytest.raises(UserError, match=message):
        resolved(**changes)


def test_kernels_of_gpus_see_the_width_of_whole_heads():
    """128 + 64 numbers, more than cuDNN's backward pass has before Hopper."""
    config = resolve(resolved(), "gpu")
    sizes = dict.fromkeys(AXES, 1)
    assert "head_dim=192" in choose_attention(config, "gpu", sizes, "8.0").why
