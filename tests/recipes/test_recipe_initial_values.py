"""Initial standard deviations of small models, as in the papers and their code."""

from math import sqrt

import jax
import numpy as np
import pytest
from experiment_files import load
from flax.core import meta
from scipy.stats import truncnorm

from lm.experiment import build_untraced
from lm.models.variables import flat

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
    steps = build_untraced(config, jax.devices()[:1]).steps
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
