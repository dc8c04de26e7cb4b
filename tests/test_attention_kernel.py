"""Choice of the attention kernel by platform, its explanation, and refusals."""

from __future__ import annotations

import re

import jax
import pytest

from lm.config import default, set_value
from lm.errors import UserError
from lm.experiment import build, resolve
from lm.models.attention import choose_attention
from lm.parallel.mesh import AXES
from lm.training.trainer import describe

ONE = dict.fromkeys(AXES, 1)
LONG = {"data.sequence_length": 1024, "model.head_dim": 128, "model.vocab_size": 64}
ONE_TEXT = {"data.isolate_documents": False}
ALIBI = {"model.positions": "alibi"}
WIDE = {"model.head_dim": 256}
T5 = {
    "model.family": "encoder_decoder",
    "objective.name": "span_corruption",
    "model.positions": "relative",
}
BERT = {
    "model.family": "encoder",
    "objective.name": "masked",
    "model.attention_dropout": 0.1,
}
PREFIX = {"objective.name": "prefix"}
SINKS = {"model.attention_sinks": True}
LOCAL_ENCODER = {"model.family": "encoder", "objective.name": "masked", "model.window": 256}
CHUNKS = {"model.window": 512, "model.window_chunks": True}
GEMMA = {"model.window": 512, "model.global_every": 2, "model.attention_softcap": 50.0}


def choice(platform, values=None, capability="", **sizes):
    config = default()
    for path, value in {**LONG, **(values or {})}.items():
        set_value(config, path, value)
    return choose_attention(resolve(config, platform), platform, {**ONE, **sizes}, capability)


@pytest.mark.parametrize(
    ("platform", "values", "sizes", "kernel", "why"),
    [
        ("cpu", {}, {}, "tiled", "the one for cpu"),
        ("tpu", {}, {}, "splash", "the one for tpu"),
        ("gpu", ONE_TEXT, {}, "cudnn", "the one for gpu"),
        ("cuda", ONE_TEXT, {}, "cudnn", "the one for gpu"),
        ("gpu", {}, {}, "tokamax", "cudnn cannot be used with several texts or padding in a row"),
        ("cpu", T5, {}, "xla", "tiled cannot be used with --config.model.family=encoder_decoder"),
        ("tpu", T5, {}, "flash", "splash cannot be used with --config.model.positions=relative"),
        ("cpu", ALIBI, {}, "xla", "tiled cannot be used with --config.model.positions=alibi"),
        ("tpu", ALIBI, {}, "flash", "splash cannot be used with --config.model.positions=alibi"),
        ("tpu", BERT, {}, "flash", "splash cannot be used with --config.model.attention_dropout"),
        ("tpu", PREFIX, {}, "flash", "splash cannot be used with --config.objective.name=prefix"),
        ("gpu", ALIBI, {}, "xla", "cudnn cannot be used with --config.model.positions=alibi"),
        (
            "gpu",
            {"model.dtype": "float32"},
            {},
            "xla",
            "cudnn cannot .*dtype=float32",
        ),
        ("gpu", {}, {"context": 2}, "cudnn", "the one for gpu"),
        ("gpu", {"model.window": 9}, {"context": 2}, "xla", "cudnn cannot .*ring and .*window=9"),
        ("tpu", {"data.sequence_length": 1000}, {}, "flash", "1000 tokens, not a multiple of 128"),
        ("tpu", {"model.attention": "blockwise"}, {}, "blockwise", "as configured"),
        ("tpu", GEMMA, {}, "splash", "the one for tpu"),
        ("cpu", SINKS, {}, "tiled", "the one for cpu"),
        ("tpu", SINKS, {}, "splash", "the one for tpu"),
        ("tpu", SINKS, {"context": 2}, "splash", "the one for tpu"),
        ("gpu", SINKS, {}, "triton", "tokamax cannot be used with .*attention_sinks=True"),
        ("tpu", LOCAL_ENCODER, {}, "splash", "the one for tpu"),
        ("gpu", LOCAL_ENCODER, {}, "triton", "cudnn cannot .*window=256 of an encoder"),
        ("tpu", LOCAL_ENCODER, {"context": 2}, "splash", "the one for tpu"),
        ("gpu", CHUNKS, {}, "tokamax", "cudnn cannot .*several texts"),
        ("tpu", CHUNKS, {}, "splash", "the one for tpu"),
        ("tpu", CHUNKS | {"model.window": 1024}, {}, "splash", "the one for tpu"),
        ("cpu", SINKS, {"context": 2}, "xla", "tiled cannot be used with .*mesh.context=2"),
        (
            "cpu",
            GEMMA,
            {},
            "xla",
            "tiled cannot be used with --config.model.attention_softcap=50.0",
        ),
        (
            "gpu",
            GEMMA,
            {},
            "tokamax",
            "cudnn cannot be used with --config.model.attention_softcap=50.0",
        ),
        ("gpu", ONE_TEXT | {"model.window": 128}, {}, "cudnn", "the one for gpu"),
        ("gpu", {"data.sequence_length": 1001}, {}, "triton", "1001 tokens, not a multiple of 128"),
    ],
)
def test_platforms_own_kernel_or_the_reason_why_not(platform, values, sizes, kernel, why):
    found = choice(platform, values, **sizes)
    assert found.kernel == kernel
    assert re.search(why, found.why), found.why


@pytest.mark.parametrize(
    ("capability", "values", "kernel", "why"),
    [
        ("8.0", ONE_TEXT, "cudnn", "the one for gpu"),
        ("8.0", {}, "triton", r"tokamax cannot be used with GPUs of compute capability 8\.0"),
        ("8.0", ONE_TEXT | WIDE, "triton", "cudnn .*head_dim=256 .a multiple of 8 up to 128"),
        ("9.0", ONE_TEXT | WIDE, "cudnn", "the one for gpu"),
        ("9.0", WIDE | GEMMA, "tokamax", "cudnn cannot .*softcap"),
        ("9.0", {"model.window": 512}, "tokamax", "cudnn cannot .*several texts"),
        (
            "9.0",
            {"model.window": 256},
            "triton",
            "tokamax cannot .*window=256 .its backward pass computes all",
        ),
        ("9.0", {"model.attention": "cudnn"}, "cudnn", "as configured"),
        ("10.0", ONE_TEXT | WIDE, "triton", "cudnn .*up to 128"),
        ("10.0", {}, "triton", r"capability 10\.0"),
        ("7.5", {}, "xla", r"capability 7\.5, only with NVIDIA's 8\.0"),
        ("gfx942", ONE_TEXT, "xla", r"capability gfx942"),
        ("9.0", {"model.attention_dropout": 0.1}, "xla", "triton cannot .*dropout=0.1"),
    ],
)
def test_gpus_have_different_kernels(capability, values, kernel, why):
    found = choice("gpu", values, capability=capability)
    assert found.kernel == kernel
    assert re.search(why, found.why), found.why


@pytest.mark.parametrize(
    ("platform", "values", "kernel", "across"),
    [
        ("cpu", {}, "xla", "ring"),
        ("cpu", T5, "xla", "gather"),
        ("cpu", ALIBI, "xla", "gather"),
        ("cpu", {"model.attention_dropout": 0.1}, "xla", "gather"),
        ("cpu", {"parallel.context_attention": "gather"}, "xla", "gather"),
        ("tpu", {}, "splash", "ring"),
        ("tpu", {"parallel.context_attention": "gather"}, "splash", "gather"),
        ("tpu", GEMMA, "splash", "ring"),
        ("tpu", {"objective.name": "prefix"}, "splash", "ring"),
        ("cpu", {"model.attention": "blockwise", **GEMMA}, "blockwise", "ring"),
        ("cpu", {"objective.name": "prefix", **GEMMA}, "xla", "gather"),
        ("tpu", ALIBI, "flash", "gather"),
        ("gpu", {"model.window": 128}, "xla", "ring"),
    ],
)
def test_choice_of_context_attention(platform, values, kernel, across):
    found = choice(platform, values, context=4)
    assert (found.kernel, found.across) == (kernel, across)


@pytest.mark.parametrize(
    ("platform", "values", "sizes", "message"),
    [
        ("cpu", {"model.attention": "splash"}, {}, "splash cannot be used with cpu devices"),
        ("tpu", {"model.attention": "cudnn"}, {}, "cudnn cannot be used with tpu devices"),
        ("gpu", {"model.attention": "cudnn", "model.head_dim": 512}, {}, "head_dim=512"),
        ("gpu", {"model.attention": "triton", **ALIBI}, {}, "triton cannot .*positions=alibi"),
        ("tpu", {"model.attention": "splash", "data.sequence_length": 1000}, {}, "1000 tokens"),
        ("tpu", {"model.attention": "splash"}, {"context": 8}, "not a multiple of 2048"),
        ("cpu", {"model.attention": "flash"}, {}, "flash cannot be used with cpu devices"),
        (
            "tpu",
            {"model.attention": "flash", "data.sequence_length": 1000},
            {"context": 2},
            "1000 tokens, not a multiple of 256",
        ),
        ("cpu", {"model.attention": "tiled"}, {"context": 2}, "tiled cannot .*context=2"),
        ("cpu", {"model.attention": "blockwise", "data.sequence_length": 1021}, {}, "no divisor"),
        ("cpu", {"model.attention": "blockwise", **ALIBI}, {}, "blockwise cannot .*=alibi"),
        ("gpu", {"model.attention": "cudnn", **ALIBI}, {}, "cudnn cannot .*positions=alibi"),
        (
            "cpu",
            {"parallel.context_attention": "ring", "objective.name": "prefix", **GEMMA},
            {"context": 2},
            "ring and .*window=512",
        ),
        (
            "cpu",
            {"parallel.context_attention": "gather", "model.attention": "blockwise"},
            {"context": 2},
            "blockwise cannot .*context_attention=gather",
        ),
        (
            "cpu",
            {"parallel.context_attention": "ring", **T5},
            {"context": 2},
            "ring and .*relative",
        ),
        (
            "gpu",
            {"model.attention": "cudnn", "model.window": 9},
            {"context": 2},
            "=ring and --config.model.window=9; cudnn .*context_attention=gather: use auto",
        ),
    ],
)
def test_named_kernel_that_cannot_run_is_an_error(platform, values, sizes, message):
    with pytest.raises(UserError, match=message):
        choice(platform, values, **sizes)


def built(**overrides):
    config = default()
    config.model.vocab_size, config.data.sequence_length = 64, 32
    for path, value in overrides.items():
        set_value(config, path.replace("__", "."), value)
    return build(config, jax.devices())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data__sequence_length": 36, "parallel__mesh__context": 8}, r"36 is not divisible by 16"),
        ({"model__family": "lstm", "parallel__mesh__context": 8}, "context=8 needs self-attention"),
    ],
)
def test_length_indivisible_by_the_mesh_is_an_error(overrides, message):
    with pytest.raises(UserError, match=message):
        built(**overrides)


def test_start_of_training_says_which_kernel_runs_and_why():
    said = describe(built(parallel__mesh__context=4))
    assert "attention kernel xla (tiled cannot be used with --config.parallel" in said
    assert "ring over 4 sequence shards" in said
    assert "attention kernel tiled (the one for cpu)" in describe(built())
