"""Training that learns nothing, or cannot continue, ends with a line that names the cause."""

import json
import re

import jax
import jax.numpy as jnp
import pytest

from lm.config import set_value, validate
from lm.config.registries import SCHEMA
from lm.errors import UserError
from lm.evaluation.loss import has_spaced_words
from lm.experiment import build
from lm.training.diagnosis import nonfinite_message, require_learning
from lm.training.trainer import train

GOOD = {"weights": jnp.ones(3)}
BAD = {"weights": jnp.array([1.0, jnp.nan])}


@pytest.mark.usefixtures("one_device")
def test_data_without_targets_end_at_the_first_step(tiny_config, tmp_path):
    (tmp_path / "letters.txt").write_text("a\nb\nc\n" * 200)
    config = tiny_config(data__source=f"text:{tmp_path}/letters.txt", data__tokenizer="char")
    with pytest.raises(UserError, match=r"have no targets.*isolate_documents"):
        train(config, tmp_path / "run")


@pytest.mark.usefixtures("one_device")
def test_gradient_of_zero_ends_at_the_first_step(tiny_config, tmp_path):
    with pytest.raises(UserError, match=r"gradient of the first step is 0.*model\.init_std"):
        train(tiny_config(model__init_std=0.0), tmp_path / "run")


def test_learning_rate_of_zero_ends_at_the_first_step():
    values = {"target_tokens": 8.0, "grad_norm": 1.0, "learning_rate": 0.0}
    with pytest.raises(UserError, match=r"learning rate of the first step is 0.*lm eval"):
        require_learning(values, None, None, None)


@pytest.mark.usefixtures("one_device")
def test_zero_rate_steps_and_oversized_batches_are_reported(tiny_config, tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 9)
    config = tiny_config(
        data__source=f"text:{tmp_path}/text.txt",
        data__batch_size=16,
        data__validation_fraction=0.0,
        schedule__final_ratio=0.0,
        schedule__decay_steps=2,
        train__steps=4,
    )
    lines = []
    train(config, tmp_path / "run", log=lines.append)
    notes = [line for line in lines if line.startswith("note:")]
    assert "the learning rate is 0 from step 3 to the last, 4," in notes[0]
    assert re.search(r"are [1-9] row\(s\), fewer than --config.data.batch_size=16", notes[1])
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "run/metrics.jsonl").open()]
    assert [rate > 0 for rate in rates] == [True, True, False, False]


@pytest.mark.parametrize(
    ("labels", "n_classes", "problem"),
    [
        ("good,bad", 1, "2 classes for --config.model.n_classes=1 outputs"),
        ("good,bad,good", 0, "'good' occurs 2 times"),
        ("good, bad ,bad", 9, "'bad' occurs 2 times"),
        ("good", 0, "a single class leaves nothing to learn"),
        ("", 3, "name the classes of --config.model.n_classes=3"),
    ],
)
def test_labels_that_do_not_fit_the_outputs(make_kind, labels, n_classes, problem):
    config = make_kind("classification encoder", data__labels=labels, model__n_classes=n_classes)
    with pytest.raises(UserError, match=problem):
        build(config, jax.devices()[:1])


@pytest.mark.parametrize(
    "path",
    [
        *("optimizer.adamw.eps", "model.norm_eps", "lora.alpha", "optimizer.layer_decay"),
        *("optimizer.muon.adam_ratio", "schedule.step_factor"),
    ],
)
def test_divisor_or_factor_of_zero_is_out_of_range(tiny_config, path):
    config = tiny_config()
    validate(config)
    set_value(config, path, 0.0)
    with pytest.raises(UserError, match=f"{path}=0.0 is below {SCHEMA[path].low}"):
        validate(config)


@pytest.mark.parametrize(
    ("step", "loss", "rate", "decay", "params", "expected"),
    [
        (7, jnp.inf, 0.1, 0.1, GOOD, "loss is not finite at step 7.*Lower the learning rate"),
        (7, 2.0, 0.1, 0.1, GOOD, "gradient is not finite.*Lower the learning rate"),
        (7, jnp.nan, 0.0, 0.1, GOOD, "learning rate is 0"),
        (7, jnp.nan, 0.1, 20.0, GOOD, r"weight_decay=20.0 times the rate 0.1 is above 1"),
        (1, jnp.nan, 0.1, 0.1, GOOD, "not the cause: look at the data"),
        (1, jnp.nan, 0.1, 0.1, BAD, "1 parameters, such as weights, .* before the first step"),
        (7, jnp.nan, 0.1, 0.1, BAD, r"such as weights, .*config\.optimizer"),
    ],
)
def test_learning_rate_is_named_only_where_it_may_be_the_cause(
    step, loss, rate, decay, params, expected
):
    values = {"loss": loss, "learning_rate": rate}
    message = nonfinite_message(step, values, params, decay, saved_at=step)
    assert "\n" not in message
    assert ("Lower the learning rate" in message) == ("Lower the learning rate" in expected)
    with pytest.raises(UserError, match=expected):
        raise UserError(message)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the quick brown fox, and der Hund läuft — 'schnell'", True),
        ("привет мир, как дела", True),
        ("안녕 세상 나는 학생 입니다", True),
        ("नमस्ते दुनिया", True),
        ("我喜欢机器翻译。", False),
        ("今日はいい天気です", False),
        ("สวัสดีชาวโลก", False),
        ("for (int i = 0; i < n; i++) { total += x[i]; }", False),
        ("def f(x):\n    return g(x)[0]\n", False),
        ("", False),
    ],
)
def test_texts_whose_words_are_between_spaces(text, expected):
    assert has_spaced_words(text) == expected
