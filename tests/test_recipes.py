"""How published models were trained: formulas and tables of their papers against our experiments.

Updates t count from 1, as in the papers; our steps count from 0.
"""

from math import cos, pi, sqrt
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.core import meta
from scipy.stats import truncnorm

from lm import config as configs
from lm.experiment import wire
from lm.flops import tokens_per_row
from lm.optim.optimizers import decay_mask
from lm.optim.parameter_groups import flat
from lm.optim.schedules import make_schedule

FOLDER = Path(__file__).parents[1] / "experiments"


def load(spec, **changes):
    overrides = {path.replace("__", "."): str(value) for path, value in changes.items()}
    return configs.load(f"{FOLDER}/{spec}", overrides)


# --- learning rates at five updates


def warm(t, warmup, peak, after):
    return peak * t / warmup if t <= warmup else after


def cosine(t, warmup, end, peak, last):
    """Down to `last` of the peak at update `end`, and constant after it."""
    done = min((t - 1 - warmup) / (end - warmup), 1)
    return warm(t, warmup, peak, peak * (last + (1 - last) * (1 + cos(pi * done)) / 2))


def line(t, warmup, end, peak):
    return warm(t, warmup, peak, peak * (end - t + 1) / (end - warmup))


def gpt3(peak, batch):
    """Appendix B: 375M tokens of warm-up, "cosine decay … down to 10% of its value, over 260
    billion tokens", then constant."""
    return lambda t: cosine(t, int(375e6 / batch), int(260e9 / batch), peak, 0.1)


def noam(d_model, t):
    """Vaswani et al. 2017, eq. 3."""
    return d_model**-0.5 * min(t**-0.5, t * 4000**-1.5)


def zaremba(at_peak, factor, epoch, t):
    """Zaremba et al. 2014, §4.1, of summed gradients; ours are means of 35 words."""
    return 35 * factor ** -max((t - 1) // epoch + 1 - at_peak, 0)


LEARNING_RATES = {
    # Radford et al. 2018, §4.1: 2,000 updates of warm-up, annealed to 0 over 100 epochs.
    "gpt1.py:117m": (
        lambda t: cosine(t, 2000, 2_441_406, 2.5e-4, 0.0),
        (1, 1000, 2000, 1_000_000, 2_441_406),
    ),
    # llm.c, run_gpt2_124M.sh; nanoGPT, config/train_gpt2.py
    "gpt2.py:124m": (
        lambda t: cosine(t, 700, 19_560, 6e-4, 0.0),
        (1, 350, 700, 10_000, 19_560),
    ),
    "gpt2.py:nanogpt": (
        lambda t: cosine(t, 2000, 600_000, 6e-4, 0.1),
        (1, 1000, 2000, 300_000, 600_000),
    ),
    # Brown et al. 2020, Table 2.1
    "gpt3.py:125m": (gpt3(6e-4, 2**19), (1, 400, 715, 250_000, 560_000)),
    "gpt3.py:175b": (gpt3(0.6e-4, 1568 * 2048), (1, 60, 116, 40_000, 90_000)),
    # Devlin et al. 2018, A.2
    "bert.py:base": (
        lambda t: line(t, 10_000, 1_000_000, 1e-4),
        (1, 5000, 10_000, 500_000, 1_000_000),
    ),
    # Liu et al. 2019, Table 9
    "roberta.py:base": (
        lambda t: line(t, 24_000, 500_000, 6e-4),
        (1, 12_000, 24_000, 250_000, 500_000),
    ),
    "roberta.py:large": (
        lambda t: line(t, 30_000, 500_000, 4e-4),
        (1, 12_000, 30_000, 250_000, 500_000),
    ),
    "transformer2017.py:base": (lambda t: noam(512, t), (1, 1000, 4000, 4001, 100_000)),
    "transformer2017.py:big": (lambda t: noam(1024, t), (1, 1000, 4000, 4001, 300_000)),
    # Raffel et al. 2020, §3.1.2; Switch trains by T5's
    "t5.py:base": (
        lambda t: max(t, 10_000) ** -0.5,
        (1, 9999, 10_000, 10_001, 1_000_000),
    ),
    "switch.py:base-128": (lambda t: max(t, 10_000) ** -0.5, (1, 9999, 10_001, 50_000, 100_000)),
    # Touvron et al. 2023a, §2.3 and Table 2: 1.0T tokens in batches of 4M
    "llama.py:1-7b": (
        lambda t: cosine(t, 2000, 238_419, 3e-4, 0.1),
        (1, 1000, 2000, 120_000, 238_419),
    ),
    "llama.py:2-70b": (
        lambda t: cosine(t, 2000, 476_837, 1.5e-4, 0.1),
        (1, 1000, 2000, 240_000, 476_837),
    ),
    # Grattafiori et al. 2024, §3.4.1, over the steps that it takes with the last batch size
    "llama.py:3.1-405b": (
        lambda t: cosine(t, 8000, 929_832, 8e-5, 0.01),
        (1, 4000, 8000, 400_000, 929_832),
    ),
    # Bengio et al. 2003, §3.1 and §4: of every word; ours is of 128 words, the last of which is t
    "nplm.py:mlp9": (
        lambda t: 128 * 1e-3 / (1 + 1e-8 * 128 * (t - 1)),
        (1, 1000, 31_250, 62_500, 125_000),
    ),
    "nplm.py:ap": (
        lambda t: 128 * 1e-3 / (1 + 1e-8 * 128 * (t - 1)),
        (1, 1000, 100_000, 300_000, 546_000),
    ),
    "zaremba.py:medium": (
        lambda t: zaremba(6, 1.2, 1327, t),
        (1, 6 * 1327, 6 * 1327 + 1, 20 * 1327, 39 * 1327),
    ),
    "zaremba.py:large": (
        lambda t: zaremba(14, 1.15, 1327, t),
        (1, 14 * 1327, 14 * 1327 + 1, 30 * 1327, 55 * 1327),
    ),
}


@pytest.mark.parametrize("spec", LEARNING_RATES)
def test_learning_rate(spec):
    formula, updates = LEARNING_RATES[spec]
    config = load(spec)
    rate = make_schedule(config.optimizer.learning_rate, config.schedule, config.train.steps)
    assert len(updates) == 5
    assert updates[-1] <= config.train.steps
    for t in updates:
        expected = pytest.approx(formula(t), rel=1e-3, abs=1e-3 * config.optimizer.learning_rate)
        assert float(rate(t - 1)) == expected, t


# --- optimizer: first and second moment's decay, epsilon, weight decay, clipping; dropout

ADAM = {
    "gpt1.py:117m": (0.9, 0.999, 1e-8, 0.01, 1.0, 0.1),
    "gpt2.py:124m": (0.9, 0.95, 1e-8, 0.1, 1.0, 0.0),
    "gpt2.py:nanogpt": (0.9, 0.95, 1e-8, 0.1, 1.0, 0.0),
    "gpt3.py:175b": (0.9, 0.95, 1e-8, 0.1, 1.0, 0.0),
    "bert.py:large": (0.9, 0.999, 1e-6, 0.01, 1.0, 0.1),
    "roberta.py:base": (0.9, 0.98, 1e-6, 0.01, 0.0, 0.1),
    "transformer2017.py:base": (0.9, 0.98, 1e-9, 0.0, 0.0, 0.1),
    "transformer2017.py:big": (0.9, 0.98, 1e-9, 0.0, 0.0, 0.3),
    "transformer2017.py:big-fr": (0.9, 0.98, 1e-9, 0.0, 0.0, 0.1),
    "llama.py:1-65b": (0.9, 0.95, 1e-8, 0.1, 1.0, 0.0),
    "llama.py:2-7b": (0.9, 0.95, 1e-5, 0.1, 1.0, 0.0),
}


@pytest.mark.parametrize("spec", ADAM)
def test_adam(spec):
    config = load(spec)
    optimizer, adam = config.optimizer, config.optimizer.adamw
    assert optimizer.name == "adamw"
    assert adam.bias_correction == (not spec.startswith("bert"))
    found = (adam.b1, adam.b2, adam.eps, optimizer.weight_decay, optimizer.clip_norm)
    assert (*found, config.model.dropout) == ADAM[spec]


@pytest.mark.parametrize("spec", ["t5.py:large", "t5.py:1.1-large", "switch.py:base-8"])
def test_adafactor_of_t5(spec):
    """Raffel et al. 2020, §3.1.2 and the released settings; 1.1 and Switch pretrain without
    dropout."""
    config = load(spec)
    optimizer, adafactor = config.optimizer, config.optimizer.adafactor
    assert (optimizer.name, optimizer.weight_decay, optimizer.clip_norm) == ("adafactor", 0, 0)
    assert (adafactor.decay_rate, adafactor.clip_threshold) == (0.8, 1.0)
    assert (adafactor.parameter_scale, adafactor.min_dim) == (True, 128)
    assert config.model.dropout == (0.1 if spec == "t5.py:large" else 0)


@pytest.mark.parametrize(
    ("size", "dropout", "bound", "clip"), [("medium", 0.5, 0.05, 5), ("large", 0.65, 0.04, 10)]
)
def test_sgd_of_zaremba(size, dropout, bound, clip):
    config = load(f"zaremba.py:{size}")
    optimizer, model = config.optimizer, config.model
    assert (optimizer.name, optimizer.sgd.momentum, optimizer.weight_decay) == ("sgd", 0, 0)
    assert optimizer.clip_norm == pytest.approx(clip / 35)  # of a mean of 35 words
    assert (model.dropout, model.init, model.init_std) == (dropout, "uniform", bound)


# --- what decays

LAYER = ("attention/key", "attention/out", "attention/query", "attention/value")
FEED_FORWARD = ("feed_forward/in", "feed_forward/out")
GATED = ("feed_forward/gate", *FEED_FORWARD)
DECAYING = {
    # every matrix, the tables too (llm.c; nanoGPT: dimensions of 2 and more)
    "gpt2.py:124m": (("positions", "tokens"), (), FEED_FORWARD),
    # all but those whose names have LayerNorm, layer_norm or bias (google-research/bert)
    "bert.py:base": (
        ("positions", "tokens", "types"),
        ("pooler", "sentence_head", "transform"),
        FEED_FORWARD,
    ),
    "gpt1.py:117m": (("positions", "tokens"), (), FEED_FORWARD),
    "llama.py:3-8b": (("tokens",), ("head",), GATED),
    # queries' biases and norms of heads do not
    "qwen.py:2-7b": (("tokens",), ("head",), GATED),
    "qwen.py:3-8b": (("tokens",), ("head",), GATED),
}


def decaying(config):
    experiment = wire(config, jax.devices()[:1])
    mask = flat(decay_mask(config.optimizer.decay)(experiment.param_shapes))
    return {path for path, decays in mask.items() if decays}


@pytest.mark.parametrize("spec", DECAYING)
def test_what_decays(spec):
    tables, outside, feed_forward = DECAYING[spec]
    assert decaying(load(spec)) == {
        *(f"{name}/embedding" for name in tables),
        *(f"{name}/kernel" for name in outside),
        *(f"stack/layers/{name}/kernel" for name in (*LAYER, *feed_forward)),
    }


def test_what_decays_in_the_nplm():
    """Bengio et al. 2003, §3.1: all weights and the features, no bias."""
    config = load("nplm.py:mlp1")
    experiment = wire(config, jax.devices()[:1])
    biases = {path for path in flat(experiment.param_shapes) if path.endswith("bias")}
    assert decaying(config) == set(flat(experiment.param_shapes)) - biases
    assert biases


# --- deviations of fresh parameters, of shrunken models

D, F, H, K, V = 256, 512, 4, 64, 512
SMALL = {"n_layers": 2, "d_model": D, "d_ff": F, "n_heads": H, "head_dim": K, "vocab_size": V}
CUT = truncnorm(-2, 2).std()
INITIAL = {
    # Radford et al. 2019, §2.3: residual projections over √N, N = 2 of each of 2 layers
    "gpt2.py:124m": {
        "tokens/embedding": 0.02,
        "attention/query/kernel": 0.02,
        "feed_forward/in/kernel": 0.02,
        "attention/out/kernel": 0.02 / sqrt(4),
        "feed_forward/out/kernel": 0.02 / sqrt(4),
    },
    # google-research/bert: truncated_normal_initializer(0.02), which cuts at two deviations
    "bert.py:base": {
        "tokens/embedding": 0.02 * CUT,
        "attention/out/kernel": 0.02 * CUT,
        "feed_forward/out/kernel": 0.02 * CUT,
        "pooler/kernel": 0.02 * CUT,
    },
    # tensor2tensor: 1 / √(mean of inputs and outputs); the shared table d^-0.5, of base's width
    "transformer2017.py:base": {
        "tokens/embedding": 512**-0.5,
        "encoder/layers/attention/query/kernel": sqrt(2 / (D + H * K)),
        "decoder/layers/feed_forward/out/kernel": sqrt(2 / (D + F)),
    },
    # the released code: the scores' 1/√K is in the queries
    "t5.py:1.1-small": {
        "tokens/embedding": 1.0,
        "attention/query/kernel": (D * K) ** -0.5,
        "attention/key/kernel": D**-0.5,
        "attention/value/kernel": D**-0.5,
        "attention/out/kernel": (H * K) ** -0.5,
        "feed_forward/gate/kernel": D**-0.5,
        "feed_forward/in/kernel": D**-0.5,
        "feed_forward/out/kernel": F**-0.5,
    },
    # Fedus et al. 2021, §2.4: √(s / n) with s = 0.1, beyond two of which it is drawn again
    "switch.py:base-8": {
        "feed_forward/experts/in/kernel": sqrt(0.1 / D) * CUT,
        "feed_forward/experts/out/kernel": sqrt(0.1 / F) * CUT,
        "attention/value/kernel": sqrt(0.1 / D) * CUT,
    },
}


def fresh(config):
    """Fresh parameters by path, of short rows."""
    config.data.sequence_length = config.model.max_length = 64
    config.data.target_length, config.data.batch_size, config.train.remat = 0, 2, "none"
    steps = wire(config, jax.devices()[:1]).steps
    batch = {
        name: np.zeros((2, *shape), dtype)
        for name, (shape, dtype) in steps.objective.shapes.items()
    }
    return flat(meta.unbox(jax.jit(steps.init)(batch)[0]))


@pytest.mark.parametrize("spec", INITIAL)
def test_initial_deviations(spec):
    config = load(spec, **{f"model__{name}": value for name, value in SMALL.items()})
    config.model.n_experts = min(config.model.n_experts, 2)
    params = fresh(config)
    for ending, expected in INITIAL[spec].items():
        found = [value for path, value in params.items() if path.endswith(ending)]
        assert found, ending
        for value in found:
            assert value.size >= 30_000
            assert float(value.std()) == pytest.approx(expected, rel=0.02), ending
            assert abs(float(value.mean())) < 0.02 * expected
            if config.model.init_truncated:
                assert abs(value).max() <= 2 * expected / CUT, ending


def test_initial_bounds_of_zaremba():
    """§4.1: "initialized uniformly in [-0.05, 0.05]"."""
    for path, value in fresh(load("zaremba.py:medium", model__d_model=64)).items():
        assert abs(value).max() <= 0.05, path
        if value.size > 30_000:
            assert float(value.std()) == pytest.approx(0.05 / sqrt(3), rel=0.02), path


# --- tokens of a batch

BATCHES = {
    "gpt1.py:117m": 64 * 512,
    "gpt2.py:124m": 524_288,
    "gpt2.py:1558m": 1_048_576,
    "gpt2.py:nanogpt": 491_520,
    "gpt3.py:125m": 0.5e6,
    "gpt3.py:760m": 0.5e6,
    "gpt3.py:1.3b": 1e6,
    "gpt3.py:2.7b": 1e6,
    "gpt3.py:6.7b": 2e6,
    "gpt3.py:13b": 2e6,
    "gpt3.py:175b": 3.2e6,
    "bert.py:base": 256 * 512,
    "roberta.py:large": 8192 * 512,
    "transformer2017.py:base": 25_000 + 25_000,
    "t5.py:base": 2048 * (512 + 114),
    "llama.py:1-7b": 4e6,
    "llama.py:2-70b": 4e6,
    "llama.py:3.1-405b": 16e6,
    "zaremba.py:large": 20 * 35,
}


@pytest.mark.parametrize("spec", BATCHES)
def test_tokens_of_a_batch(spec):
    """Papers round them, and a power of 2 is up to 5 % more: 0.5M is 524,288."""
    config = load(spec)
    experiment = wire(config, jax.devices()[:1])
    found = config.data.batch_size * tokens_per_row(experiment)
    rounded = BATCHES[spec] in (0.5e6, 1e6, 2e6, 3.2e6, 4e6, 16e6, 50_000)
    assert found == pytest.approx(BATCHES[spec], rel=0.05 if rounded else 0)


# --- objectives


def test_objectives():
    bert, roberta = load("bert.py:base").objective, load("roberta.py:base").objective
    assert (bert.name, bert.mask_rate, bert.next_sentence) == ("masked", 0.15, True)
    assert (roberta.name, roberta.mask_rate, roberta.next_sentence) == ("masked", 0.15, False)
    t5 = load("t5.py:base").objective
    assert (t5.name, t5.noise_density, t5.mean_span, t5.z_loss) == (
        "span_corruption",
        0.15,
        3,
        1e-4,
    )
    translation = load("transformer2017.py:big").objective
    assert (translation.name, translation.label_smoothing) == ("seq2seq", 0.1)
    switch = load("switch.py:base-128").model
    assert (switch.experts_per_token, switch.experts_every, switch.balance_loss) == (1, 2, 0.01)
    for spec in ("gpt1.py:117m", "gpt2.py:124m", "gpt3.py:175b", "roberta.py:base"):
        assert not load(spec).data.isolate_documents  # rows run on across documents
