"""QK-clip: heads whose logits were above the threshold have them at the threshold afterwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.cli import main
from lm.data.batches import to_device
from lm.errors import UserError
from lm.experiment import build_with_data, check
from lm.kernels.dot_product_attention import AttentionMask
from lm.models.variables import flat
from lm.qk_clip import clip, largest_logits
from lm.training.trainer import train

LATENT = {
    "model.mixer": "mla",
    "model.q_lora_rank": 8,
    "model.kv_lora_rank": 8,
    "model.head_dim": 4,
    "model.qk_nope_head_dim": 4,
    "model.v_head_dim": 8,
    "model.n_kv_heads": 0,
}
CASES = {
    "heads with biases": ("prefix decoder", {"model.mixer": "attention"}),
    "grouped heads, windows": ("causal decoder", {"model.window": 4}),
    "latent attention": ("causal decoder", LATENT),
    "a source": ("seq2seq encoder_decoder", {}),
}
STILL = {
    "model.n_layers": 1,
    "model.init": "normal",
    "model.init_std": 0.4,
    "model.dropout": 0.0,
    "model.attention_dropout": 0.0,
    "optimizer.learning_rate": 0.0,
    "data.validation_fraction": 0.0,
}


def first_batch(experiment, dataset, steps=1):
    """Return a batch, as often as there are steps."""
    return to_device(experiment.train_batches(dataset), [0] * steps, experiment.batch_sharding)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("one_device")
def test_logits_above_the_threshold_are_at_it_after_the_step(make_kind, case):
    """Parameters that only clipping moves: a step sees the logits that the one before left."""
    kind, changes = CASES[case]
    config = make_kind(kind, **STILL, **changes, optimizer__qk_clip=0.4)
    experiment, dataset = build_with_data(config, jax.devices()[:1])
    state = experiment.init_state()
    before = jax.device_get(flat(state.params))
    state, metrics = experiment.train_steps(state, first_batch(experiment, dataset, 2))
    first, second = metrics["largest_logit"]
    assert first > 0.6
    assert 0 < metrics["clipped_heads"][0] <= 1
    if case == "a source":  # whose attention has other inputs when that before it has other weights
        assert second < first
    else:
        assert float(second) == pytest.approx(0.4, rel=1e-5)
    moved = {p.split("/")[-2] for p, x in flat(state.params).items() if (x != before[p]).any()}
    keys = {"latent attention": {"up"}, "grouped heads, windows": set()}
    assert moved == {"query"} | keys.get(case, {"key"})


def test_shared_parts_stay_and_others_share_the_factor():
    """Algorithm 1: √γ for q^C and k^C, γ for q^R; a head below the threshold stays."""
    H, N, K, V = 2, 3, 2, 5
    logits = {"layers/attention/largest_logits": jnp.array([[400.0, 100.0]])}
    ones = {"query": (1, 7, H, N + K), "up": (1, 6, H, N + V), "down": (1, 7, 6 + K)}
    params = {f"layers/attention/{n}/kernel": jnp.ones(shape) for n, shape in ones.items()}
    found = clip(params, logits, 100.0, K)
    expected = {"query": [0.5] * N + [0.25] * K, "up": [0.5] * N + [1.0] * V}
    for name, row in expected.items():
        np.testing.assert_allclose(found[f"layers/attention/{name}/kernel"][0, 0, 0], row)
        np.testing.assert_allclose(found[f"layers/attention/{name}/kernel"][0, 0, 1], 1.0)
    np.testing.assert_array_equal(found["layers/attention/down/kernel"], 1.0)


def test_largest_logits_match_visible_pairs():
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(2, 1026, n, 3)).astype(np.float32) for n in (4, 2))
    segments = np.repeat([[1, 1, 2], [3, 0, 0]], 342, axis=1)
    scores = np.einsum("blhk,bshk->bhls", q, np.repeat(k, 2, axis=2))
    same = segments[:, :, None] == segments[:, None, :]
    seen = np.tril(same) & (segments != 0)[:, :, None]
    expected = np.where(seen[:, None], scores, -np.inf).max((0, 2, 3))
    found = largest_logits(
        jnp.asarray(q), jnp.asarray(k), AttentionMask(True, jnp.asarray(segments))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_mesh_and_microbatches_change_nothing(make_kind):
    further = {"data.validation_fraction": 0.0, "model.init_std": 0.4, "optimizer.name": "muon"}
    changes = LATENT | further
    config = make_kind("causal decoder", **changes, optimizer__qk_clip=0.5)
    alone, dataset = build_with_data(config, jax.devices()[:1])
    config.train.microbatches = 2
    config.parallel.mesh.update({"data": 1, "fsdp": 2, "context": 2, "tensor": 2})
    spread, _ = build_with_data(config, jax.devices())
    results, start = [], jax.device_get(alone.init_state())
    for experiment in (alone, spread):
        batches = first_batch(experiment, dataset, 3)
        placed = jax.device_put(start, experiment.state_sharding)
        state, metrics = experiment.train_steps(placed, batches)
        results.append(jax.device_get((state.params, state.model_state, metrics)))
    assert (results[0][2]["clipped_heads"] > 0).all()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), *results)
    assert not any(x.any() for x in jax.tree.leaves(results[1][1]))


@pytest.mark.usefixtures("one_device")
def test_exported_run_holds_no_logits(make_kind, tmp_path):
    llama = {"model.bias": False, "model.norm_bias": False, "train.steps": 1}
    config = make_kind("causal decoder", **llama, optimizer__qk_clip=0.001)
    assert train(config, tmp_path / "run")
    assert main(["export", "--workdir", str(tmp_path / "run"), "--to", str(tmp_path / "hf")]) == 0
    assert (tmp_path / "hf" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"model.qk_norm": True},
        {"lora.rank": 2},
        {"optimizer.ema": 0.9},
        {"model.mixer": "mamba2"},
        {"train.precision": "qat", "decode.weights": "int8"},
        {"optimizer.name": "schedule_free", "schedule.name": "constant"},
    ],
    ids=str,
)
def test_qk_clip_rejects_incompatible_settings(make_kind, change):
    config = make_kind("causal decoder", **change, optimizer__qk_clip=100.0)
    with pytest.raises(UserError, match=r"^--config\.optimizer\.qk_clip=100 (is not|cannot be)"):
        check(config, "cpu", 1)
