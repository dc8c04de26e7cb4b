"""Distillation: the divergence by its formula, and a teacher with a student of another size."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.api import evaluate, load_run
from lm.cli import main
from lm.config import default
from lm.data.splits import open_split
from lm.errors import UserError
from lm.objectives.distillation import divergence, teacher_module
from lm.training.trainer import train


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def by_formula(student, teacher, temperature, k=0):
    ids = np.argsort(-teacher, -1)[..., : k or teacher.shape[-1]]
    log_p = log_softmax(np.take_along_axis(teacher, ids, -1) / temperature)
    log_q = np.take_along_axis(log_softmax(student / temperature), ids, -1)
    return ids, temperature**2 * (np.exp(log_p) * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [0, 3])
def test_divergence_matches_the_paper(temperature, k):
    student, teacher = np.random.default_rng(0).normal(0, 2, (2, 4, 5, 9))
    ids, expected = by_formula(student, teacher, temperature, k)
    chosen = jnp.asarray(np.take_along_axis(teacher, ids, -1))
    found = divergence(jnp.asarray(student), chosen, jnp.asarray(ids), temperature)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_teacher_may_be_an_imported_run(tmp_path):
    """Its configuration is written before defaults that depend on the platform are filled in."""
    (tmp_path / "run.json").write_text(json.dumps({"config": json.loads(default().to_json())}))
    teacher = teacher_module(str(tmp_path), 8)
    assert teacher.config.dtype == jnp.float32
    assert teacher.config.max_length >= 8


@pytest.mark.usefixtures("one_device")
def test_student_learns_beside_its_teacher(tiny_config, tmp_path):
    """A later evaluation, in chunks, gives the divergence between the two models' logits."""
    large, small = tmp_path / "teacher", tmp_path / "student"
    assert train(tiny_config(train__steps=2), large)
    keys = {"objective__distill_temperature": 2.0, "objective__distill_weight": 0.75}
    config = tiny_config(model__d_model=16, objective__name="distillation", train__steps=2, **keys)
    with pytest.raises(UserError, match="needs a teacher"):
        train(config, tmp_path / "alone")
    config.objective.teacher = str(large)
    lines: list[str] = []
    assert train(config, small, log=lines.append)
    assert any(line.startswith(f"teacher: {large}, step 2") for line in lines)
    teacher, student = load_run(large), load_run(small, {"train.loss_chunk": "8"})
    beside = jax.tree.leaves(student.params["frozen"]["teacher"])
    for found, expected in zip(beside, jax.tree.leaves(teacher.params), strict=True):
        assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()
    batches = student.experiment.evaluation_batches
    stores = open_split(student.config.data, "validation", student.tokenizer, ())
    rows = batches(stores).rows(0, range(len(batches(stores).examples)))
    arrays = [rows[name] for name in ("inputs", "positions", "segment_ids")]
    logits = [
        np.asarray(run.model.apply({"params": run.params}, *arrays)) for run in (student, teacher)
    ]
    _, expected = by_formula(*logits, 2.0)
    weights = rows["weights"]
    nll = -np.take_along_axis(log_softmax(logits[0]), rows["targets"][..., None], -1)[..., 0]
    found = evaluate(student)
    n = weights.sum()
    assert found["kl"] == pytest.approx((expected * weights).sum() / n, rel=1e-4)
    mixed = 0.75 * expected + 0.25 * nll
    assert found["loss"] == pytest.approx((mixed * weights).sum() / n, rel=1e-4)

    stored = tmp_path / "stored"
    k = str(teacher.config.model.vocab_size)
    score = ["score", "--workdir", str(large), "--top_logits", k, "--output", str(stored)]
    assert main(score) == 0
    instead = {"objective.teacher": "", "objective.teacher_logits": str(stored)}
    again = evaluate(load_run(small, instead))
    for name in ("kl", "loss"):
        assert again[name] == pytest.approx(found[name], rel=1e-4)
    with pytest.raises(UserError, match="stored with sequence_length 32, not 16"):
        evaluate(load_run(small, {**instead, "data.sequence_length": "16"}))
