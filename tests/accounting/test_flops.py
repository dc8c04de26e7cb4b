"""Model FLOPs compared with the matrix products of a program's forward pass."""

from math import prod
from types import SimpleNamespace

import flax.linen as nn
import jax
import numpy as np
import pytest

from lm.accounting.flops import model_flops_per_token, peak_flops, tokens_per_row
from lm.config import default, set_value
from lm.experiment import build

L, T, N, D = 16, 12, 3, 32  # source and target lengths, layers, width

# Forward FLOPs that are not model FLOPs: the masked half of causal attention's two products, and
# the selection of a recurrent decoder's initial states (hidden and cell) in each layer.
CAUSAL_SOURCE, CAUSAL_TARGET = N * 2 * L * L * D, 2 * N * 2 * T * T * D
PICKS = N * 2 * (2 * T * L * D)
KINDS = {
    ("decoder", "causal"): CAUSAL_SOURCE,
    ("decoder", "classification"): CAUSAL_SOURCE,
    ("encoder", "masked"): 0,
    ("encoder", "classification"): 0,
    ("encoder_decoder", "seq2seq"): CAUSAL_TARGET,
    ("encoder_decoder", "transcription"): CAUSAL_TARGET,
    ("lstm", "causal"): 0,
    ("lstm", "classification"): 0,
    ("lstm_encoder_decoder", "seq2seq"): PICKS,
    ("nplm", "causal"): 0,
}


def experiment_of(family, objective, tied=True, **changes):
    config = default()
    config.model.family, config.objective.name = family, objective
    config.model.n_layers, config.model.n_decoder_layers = N, 2 * N if "lstm" not in family else 0
    config.model.d_model, config.model.n_heads, config.model.d_ff = D, 2, 80
    config.model.vocab_size, config.model.tie_embeddings = 50, tied
    config.model.attention = "xla"
    config.objective.next_sentence = objective == "masked"
    config.model.n_mels = config.data.n_mels if objective == "transcription" else 0
    for path, value in changes.items():
        set_value(config, path, value)
    config.data.labels = "good,bad,neither"
    config.data.sequence_length, config.data.target_length, config.data.batch_size = L, T, 1
    return build(config, jax.devices()[:1])


def forward_products(experiment):
    """FLOPs of all matrix products in the loss of one example."""
    steps = experiment.steps
    params, carry, _ = jax.eval_shape(steps.init, experiment.batch_shapes)
    loss = nn.apply(steps.objective.loss, steps.model, mutable=list(carry))
    program = jax.make_jaxpr(lambda p, batch: loss({"params": p, **carry}, batch))
    return _products(program(nn.meta.unbox(params), experiment.batch_shapes).jaxpr)


def _products(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            terms = prod(equation.invars[0].aval.shape[i] for i in contracted)
            total += 2 * prod(equation.outvars[0].aval.shape) * terms
        inner = (getattr(value, "jaxpr", value) for value in equation.params.values())
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(_products(part) for part in inner if hasattr(part, "eqns"))
    return total


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("family", "objective"), KINDS)
def test_model_flops_are_three_times_the_needed_products(family, objective, tied):
    copy = tied and "encoder_decoder" in family and objective != "transcription"
    experiment = experiment_of(family, objective, tied, **{"model.copy": copy})
    needed = forward_products(experiment) - KINDS[family, objective]
    flops = model_flops_per_token(experiment) * tokens_per_row(experiment)
    assert flops == pytest.approx(3 * needed)


def test_heads_of_latent_attention_count_both_their_widths():
    """The upper half of causal attention's products, 12 + 4 wide for scores and 5 for values."""
    changes = {
        "mixer": "mla", "q_lora_rank": 10, "kv_lora_rank": 6, "qk_nope_head_dim": 12,
        "head_dim": 4, "v_head_dim": 5,
    }  # fmt: skip
    experiment = experiment_of(
        "decoder", "causal", **{f"model.{name}": value for name, value in changes.items()}
    )
    needed = forward_products(experiment) - N * L * L * 2 * (16 + 5)
    assert model_flops_per_token(experiment) * L == pytest.approx(3 * needed)


def test_pairs_outside_a_window_cost_nothing():
    window, local_layers = 6, 2  # of three, the second is global
    ways = {}, {"model.window": window, "model.global_every": 2}
    all_pairs, fewer = (
        model_flops_per_token(experiment_of("decoder", "causal", **changes)) * L for changes in ways
    )
    distance = np.arange(L)[:, None] - np.arange(L)
    outside = (distance > window).sum() + (distance == window).sum() / 2  # as the main diagonal
    assert all_pairs - fewer == pytest.approx(12 * local_layers * D * outside)


def test_pairs_outside_a_chunk_cost_nothing():
    changes = {"model.window": 5, "model.window_chunks": True, "model.global_every": 2}
    all_pairs, fewer = (
        model_flops_per_token(experiment_of("decoder", "causal", **ways)) * L
        for ways in ({}, changes)
    )
    chunk = np.arange(L) // 5
    other = (chunk[:, None] != chunk).sum() / 2  # two of three layers see half of what is left
    assert all_pairs - fewer == pytest.approx(12 * 2 * D * other)


def test_row_is_a_source_and_its_target():
    for objective in ("seq2seq", "transcription"):
        assert tokens_per_row(experiment_of("encoder_decoder", objective)) == L + T
    assert tokens_per_row(experiment_of("encoder", "masked")) == L


def test_experts_count_as_often_as_a_token_uses_them():
    """Three dense layers of width 80 become 2 · 80, plus a router with 4 outputs."""
    sparse = experiment_of(
        "decoder", "causal", **{"model.n_experts": 4, "model.experts_per_token": 2}
    )
    dense = model_flops_per_token(experiment_of("decoder", "causal"))
    experts, router = N * 2 * D * 80, N * D * 4
    assert model_flops_per_token(sparse) == dense + 6 * (experts + router)


def test_skip_gram_counts_pairs_and_their_noise():
    """Windows of 1 … 5 reach 6 words on average, each of which has 5 words of noise."""
    assert model_flops_per_token(experiment_of("skip_gram", "skip_gram")) == 6 * D * 6 * (1 + 5)


def test_peak_flops_use_the_longest_matching_name():
    kinds = {"TPU v5 lite": 197e12, "TPU v5": 459e12, "NVIDIA H100 80GB HBM3": 989e12, "cpu": None}
    for kind, peak in kinds.items():
        assert peak_flops(SimpleNamespace(device_kind=kind)) == peak
