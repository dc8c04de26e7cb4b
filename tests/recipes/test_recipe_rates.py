"""Learning rates at five updates, by the papers' formulas and tables.

Updates t count from 1, as in the papers; our steps count from 0.
"""

from math import cos, pi

import pytest
from experiment_files import load

from lm.optim.optimizers import make_schedule


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
