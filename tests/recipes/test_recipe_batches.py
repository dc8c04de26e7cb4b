"""Tokens per batch, and objectives, as in the papers."""

import jax
import pytest
from experiment_files import load

from lm.accounting.flops import tokens_per_row
from lm.experiment import build_untraced

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
    "flan_t5.py:xl": 64 * (1024 + 256),
    "llama.py:1-7b": 4e6,
    "llama.py:2-70b": 4e6,
    "llama.py:3.1-405b": 16e6,
    "zaremba.py:large": 20 * 35,
}


@pytest.mark.parametrize("spec", BATCHES)
def test_tokens_of_a_batch(spec):
    """Papers round them, and a power of 2 is up to 5 % more: 0.5M is 524,288."""
    config = load(spec)
    experiment = build_untraced(config, jax.devices()[:1])
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
