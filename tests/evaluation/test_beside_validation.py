"""Evaluations during training use the trained model."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from lm.data.tokenizers.basic import ByteTokenizer
from lm.evaluation.beside_validation import further_figures
from lm.experiment import build
from lm.models.lora import merge_lora
from lm.models.variables import flat


@pytest.mark.parametrize("base", ["float32", "int8"])
def test_low_rank_updates_are_part_of_it(tiny_config, monkeypatch, tmp_path, base):
    config = tiny_config(lora__rank=2, lora__base=base, eval__safety="samples")
    experiment = build(config, jax.devices()[:1], ByteTokenizer())
    rng = np.random.default_rng(0)
    shapes = experiment.param_shapes
    params = jax.tree.map(lambda x: np.asarray(rng.integers(-3, 3, x.shape), x.dtype), shapes)
    seen = []
    figures = "lm.evaluation.safety.suite.safety_figures"
    monkeypatch.setattr(figures, lambda subject, note: seen.append(subject.params) or {})
    further_figures(experiment, params, 6, tmp_path, print, lambda n: None)
    found, expected = flat(seen[0]), flat(merge_lora(params, config.lora.alpha))
    assert found.keys() == expected.keys()
    for path, x in expected.items():
        np.testing.assert_allclose(found[path], x, rtol=1e-6)
