"""muP models are exported as plain models that compute the same function."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from runs import random_run

from lm.config import set_value
from lm.errors import UserError
from lm.experiment import build
from lm.interop import huggingface
from lm.interop.import_export import export_run, read_to_export
from lm.models.encoder_decoder import EncoderDecoder

MUP = {"model.mup_base_width": 4, "model.mup_base_head_dim": 4, "model.init_std": 0.2}
LLAMA = {
    "model.norm": "rmsnorm",
    "model.positions": "rotary",
    "model.activation": "swiglu",
    "model.bias": False,
    "model.n_kv_heads": 1,
}
MODELS = {
    "Llama": LLAMA | {"model.tie_embeddings": False},
    "Qwen3-MoE": LLAMA | {"model.qk_norm": True, "model.n_experts": 4},
    "Gemma": LLAMA
    | {
        "model.qk_norm": True,
        "model.scale_embeddings": True,
        "model.norm_unit_offset": True,
        "model.norm_placement": "both",
        "model.attention_scale": 0.3,
    },
    "GPT-2": {},
    "Kimi K2": LLAMA | {"model.mixer": "mla", "model.n_kv_heads": 0, "model.q_lora_rank": 6},
    "T5": {
        "objective.name": "span_corruption",
        "model.family": "encoder_decoder",
        "model.positions": "relative",
        "model.attention_scale": 1.0,
        "model.scale_logits": True,
    },
    "BERT": {"objective.name": "masked", "model.family": "encoder", "model.norm_placement": "post"},
    "GPT with classes": {"objective.name": "classification", "data.labels": "good,bad"},
}


def outputs(model, params, classes):
    tokens_BL = np.arange(16, dtype=np.int32).reshape(2, 8) % 60
    inputs = (tokens_BL, tokens_BL) if isinstance(model, EncoderDecoder) else (tokens_BL,)

    def run(model, *inputs):
        logits_BLV = model(*inputs)
        if not classes:
            return logits_BLV
        return logits_BLV, model.classify(model.hidden(*inputs)[:, -1])

    return jax.jit(lambda p: model.apply({"params": p}, *inputs, method=run))(params)


@pytest.mark.parametrize("name", MODELS)
def test_plain_model_computes_the_same(tmp_path, name):
    run = random_run(tmp_path / "run", MODELS[name] | MUP, None)
    found = read_to_export(run, 1, False, print)
    assert found.config.model.mup_base_width == 0
    config = found.config.copy_and_resolve_references()
    for key, value in MUP.items():
        set_value(config, key, value)
    experiment = build(config, jax.devices()[:1])
    mup = experiment.model
    assert mup.config.width_ratio == 4
    assert mup.config.query_multiplier != 1
    rng = np.random.default_rng(0)

    def draw(path, leaf):  # as `random_run`
        centre, deviation = (1, 0.2) if path[-1].key == "scale" else (0, 0.4)
        return np.float32(rng.normal(centre, deviation, leaf.shape))

    params = jax.tree_util.tree_map_with_path(draw, experiment.state_shapes.params)
    classes = "classes" in name
    expected = outputs(mup, params, classes)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(y).max()),
        outputs(found.model, found.params, classes),
        expected,
    )
    plain = outputs(found.model, params, classes)  # the multipliers are not without effect
    assert np.abs(jax.tree.leaves(plain)[0] - jax.tree.leaves(expected)[0]).max() > 0.01


def test_exported_folder_computes_the_same(tmp_path):
    run = random_run(tmp_path / "run", MODELS["Llama"] | MUP, None)
    export_run(run, tmp_path / "out", 1, False, "float32", print)
    model, params = huggingface.load(tmp_path / "out")
    found = read_to_export(run, 1, False, print)
    np.testing.assert_allclose(
        outputs(model, params, False), outputs(found.model, found.params, False), atol=1e-5
    )


def test_tied_embeddings_without_a_norm_before_them_are_rejected(tmp_path):
    run = random_run(tmp_path / "run", {"model.norm_placement": "post"} | MUP, None)
    with pytest.raises(UserError, match="norm_placement=post has none"):
        read_to_export(run, 1, False, print)
