"""muP: the plain model at its base width, Table 8 of Yang et al. 2022 at others, and its purpose,
activations that do not grow with the width."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kinds import KINDS

from lm.config import default, load_config, set_value
from lm.errors import UserError
from lm.experiment import build
from lm.models.variables import flat
from lm.tools.reports.coordinate_check import activation_scales

TINY = {
    "model.n_layers": 2,
    "model.n_heads": 2,
    "model.d_model": 16,
    "model.vocab_size": 64,
    "data.sequence_length": 8,
    "data.batch_size": 4,
    "parallel.mesh.data": 1,
    "train.scan_unroll": 0,
}


def config_of(**changes):
    config = default()
    for path, value in (TINY | {k.replace("__", "."): v for k, v in changes.items()}).items():
        set_value(config, path, value)
    return config


def batch_of(experiment):
    """A batch in which every token is followed by the next but one."""
    shapes = experiment.batch_shapes
    B, L = shapes["inputs"].shape
    tokens = (5 * np.arange(B)[:, None] + 2 * np.arange(L + 1)) % 64
    batch = {name: np.ones(s.shape, s.dtype) for name, s in shapes.items()}
    batch |= {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    return {name: jnp.asarray(values, shapes[name].dtype) for name, values in batch.items()}


def trained(config, steps=2):
    """Parameters by path before and after some steps."""
    experiment = build(config, jax.devices()[:1])
    batch = {k: jnp.stack([v] * steps) for k, v in batch_of(experiment).items()}
    before = experiment.init_state()
    first = {path: np.asarray(x) for path, x in flat(before.params).items()}
    after, _ = experiment.train_steps(before, batch)
    return first, {path: np.asarray(x) for path, x in flat(after.params).items()}


T5 = {"model.tie_embeddings": True, "model.scale_logits": True, "model.scale_embeddings": True}


@pytest.mark.parametrize(
    ("style", "optimizer"),
    [
        (KINDS["causal decoder"] | {"model.tie_embeddings": False}, "adamw"),
        (KINDS["span_corruption encoder_decoder"] | T5, "muon"),
    ],
    ids=["like Llama, AdamW", "like T5, Muon"],
)
def test_at_the_base_width_it_is_the_plain_model(style, optimizer):
    style = {k: v for k, v in style.items() if k.startswith("model.")}
    plain = trained(config_of(**style, optimizer__name=optimizer))
    base = {"model__mup_base_width": 16, "model__mup_base_head_dim": 8}
    same = trained(config_of(**style, optimizer__name=optimizer, **base))
    for was, now in zip(plain, same, strict=True):
        assert was.keys() == now.keys()
        for path in was:
            np.testing.assert_array_equal(was[path], now[path], err_msg=path)


def test_initial_deviations_and_first_updates_match_table_8():
    """Four times the base width: hidden kernels start with half the deviation and move a quarter as
    far, everything else starts and moves as in the base model."""
    options = {
        "model__d_model": 128,
        "model__norm": "rmsnorm",
        "model__tie_embeddings": False,
        "model__scale_residual_init": False,
        "optimizer__weight_decay": 0.0,
        "optimizer__clip_norm": 0.0,
        "schedule__name": "constant",
        "optimizer__adamw__eps": 1e-30,
    }
    before, after = trained(config_of(**options, model__mup_base_width=32), steps=1)
    for path, was in before.items():
        hidden = path.startswith("stack/layers/") and path.endswith("/kernel")
        if path.endswith(("/kernel", "/embedding")):
            assert was.std() == pytest.approx(0.02 / (2 if hidden else 1), rel=0.05), path
        moved = np.abs(after[path] - was)
        moved = moved[moved > 1e-6]  # rows of tokens that are not in the batch stay
        assert np.median(moved) == pytest.approx(1e-3 / (4 if hidden else 1), rel=1e-2), path


def test_attention_scores_fall_with_the_head_dimension_and_not_with_its_root():
    """Of heads four times as large the same scores: q·k over 32, times sqrt(8) of the base."""
    config = build(
        config_of(model__d_model=64, model__mup_base_width=16, model__mup_base_head_dim=8),
        jax.devices()[:1],
    ).model.config
    assert config.query_multiplier * config.head_dim**-0.5 == pytest.approx(8**0.5 / 32)


def test_activations_keep_their_scale_over_widths_and_grow_in_the_plain_model():
    """The coordinate check (appendix D.1), after a few steps at a rate that suits width 128."""

    def scales(width, base):
        config = config_of(
            model__d_model=width,
            model__n_layers=1,
            model__norm="rmsnorm",
            model__mup_base_width=base,
            model__mup_base_head_dim=64 if base else 0,
            data__sequence_length=16,
            data__batch_size=8,
            optimizer__learning_rate=1e-2,
            schedule__name="constant",
        )
        batch = batch_of(build(config, jax.devices()[:1]))
        return {name: x[-1] for name, x in activation_scales(config, batch, steps=4).items()}

    narrow, plain, wide = scales(128, 0), scales(512, 0), scales(512, 128)
    for name, scale in narrow.items():
        assert plain[name] > 2 * scale, name
        assert scale / 1.5 < wide[name] < 1.5 * scale, name


def test_coordinate_check_measures_with_the_model_state():
    """A router bias of a rate so high that the experts of a token change with it."""

    def scales(rate):
        config = config_of(
            model__n_experts=4, model__experts_per_token=1, model__router_bias_rate=rate
        )
        batch = batch_of(build(config, jax.devices()[:1]))
        return activation_scales(config, batch, steps=1)["feed-forward"]

    (start, still), (same, moved) = scales(0.0), scales(1.0)
    assert start == same
    assert still != moved


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer.name": "sgd"}, "needs --config.optimizer.name adamw, muon, "),
        (
            {"model.family": "lstm"},
            "mup_base_width is not supported with --config.model.family=lstm",
        ),
        ({"model.mup_base_width": "0"}, "mup_base_head_dim=8 needs --config.model.mup_base_width"),
    ],
)
def test_unsupported_models_are_rejected(values, message):
    both = {"model.mup_base_width": "16", "model.mup_base_head_dim": "8"}
    with pytest.raises(UserError, match=message):
        load_config("experiments/stdlib.py:tiny", both | values)
