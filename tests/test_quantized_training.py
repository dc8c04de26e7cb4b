"""Quantization-aware training: loss and gradients are those of the rounded weights."""

import jax
import numpy as np
import pytest

from lm.config import default, validate
from lm.errors import UserError
from lm.experiment import build
from lm.models.quantized_kernel import round_params
from lm.models.variables import flat, nested

SIZES = {
    "n_layers": 2, "d_model": 32, "n_heads": 4, "d_ff": 64, "vocab_size": 48, "init_std": 0.2,
}  # fmt: skip
KINDS = {
    "decoder": {"model.tie_embeddings": True},
    "experts on a mesh": {
        "model.n_experts": 4, "model.activation": "swiglu", "model.norm": "rmsnorm",
        "parallel.mesh.fsdp": 2, "parallel.mesh.expert": 2, "parallel.mesh.data": 1,
    },
    "lstm": {"model.family": "lstm", "model.d_hidden": 32},
}  # fmt: skip


def experiment_of(changes, precision="none", weights="int4"):
    config = default()
    config.model.update(SIZES)
    config.data.sequence_length, config.data.batch_size = 8, 4
    config.optimizer.name, config.optimizer.learning_rate = "sgd", 1.0
    config.optimizer.weight_decay, config.schedule.name = 0.0, "constant"
    config.train.precision, config.decode.weights = precision, weights
    config.update_from_flattened_dict(changes)
    n = 4 if "parallel.mesh.fsdp" in changes else 1
    return build(config, jax.devices()[:n])


def batches_of(experiment):
    rng = np.random.default_rng(0)
    drawn = {
        name: rng.integers(1, 48, (1, *x.shape)).astype(x.dtype)
        for name, x in experiment.batch_shapes.items()
    }
    fixed = {"weights": 1, "segment_ids": 1, "positions": np.arange(8)}
    for name in fixed.keys() & drawn.keys():
        drawn[name] = np.broadcast_to(fixed[name], drawn[name].shape).astype(drawn[name].dtype)
    return jax.device_put(drawn, experiment.batch_sharding)


@pytest.mark.parametrize(("kind", "weights"), [*((k, "int4") for k in KINDS), ("decoder", "int8")])
def test_step_matches_a_model_with_rounded_weights(kind, weights):
    plain, rounding = (experiment_of(KINDS[kind], p, weights) for p in ("none", "qat"))
    state = plain.init_state()
    before = jax.device_get(state.params)
    round_all = jax.jit(lambda params: round_params(flat(params), plain.param_infos, weights))
    rounded = nested(round_all(state.params))
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), before, rounded)
    assert max(jax.tree.leaves(moved)) > 0.002
    start = jax.device_get(rounded)
    batches = batches_of(plain)
    expected, figures = plain.train_steps(state.with_inference_params(rounded), batches)
    found, metrics = rounding.train_steps(rounding.init_state(), batches)
    np.testing.assert_allclose(metrics["loss"], figures["loss"], rtol=1e-5)
    update = flat(jax.tree.map(np.subtract, expected.params, start))
    for path, x in flat(jax.tree.map(np.subtract, found.params, before)).items():
        np.testing.assert_allclose(x, update[path], rtol=1e-3, atol=1e-5, err_msg=path)


def test_qat_needs_a_format_and_no_lora():
    config = default()
    config.train.precision = "qat"
    with pytest.raises(UserError, match=r"decode\.weights"):
        validate(config)
    config.decode.weights, config.lora.rank = "int4", 2
    with pytest.raises(UserError, match=r"lora\.rank"):
        validate(config)
