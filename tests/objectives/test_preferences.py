"""Preferences: TRL's losses, contents of a row, and the reference model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config.registries import SCHEMA
from lm.errors import UserError
from lm.experiment import build_with_data
from lm.models.task_layers import last_of_row
from lm.objectives.preferences import PREFERENCES, LogProbs, Preferences, UnpairedPreferences
from lm.objectives.reward import Reward

# Written by scripts/check_preferences.py, which also compares the gradients of all parameters.
OF_TRL = json.loads(Path(__file__).with_name("trl_preferences.json").read_text())


def options(**given):
    defaults = {
        path.removeprefix("objective."): key.default
        for path, key in SCHEMA.items()
        if path.startswith("objective.")
    }
    return SimpleNamespace(**{**defaults, **given})


def record(prompt, label=True, **completions):
    tokens = {"prompt": prompt, **completions}
    arrays = {name: np.asarray(ids, np.int32) for name, ids in tokens.items()}
    return SimpleNamespace(tokens=arrays, raw={"label": label})


class Log:
    """A model whose hidden states are its logits: the token's own row of a table."""

    config = SimpleNamespace(loss_chunk=0)

    def __init__(self, table):
        self._table = jnp.asarray(table, jnp.float32)

    def hidden(self, tokens, positions, segments):
        return self._table[tokens]

    def logits(self, x):
        return x


@pytest.mark.parametrize("case", [case for case in OF_TRL if "reward" not in case])
def test_losses_and_figures_match_trl(case):
    kept, name = OF_TRL[case], case.split()[1]
    objective = Preferences(name, 16, options(**kept["options"]))
    scores = LogProbs(
        jnp.asarray(kept["policy"]),
        jnp.asarray(kept.get("reference", np.zeros((7, 2)))),
        jnp.asarray(kept["label"]) if "label" in kept else None,
        jnp.ones(7),
        jnp.asarray(kept.get("nll", 0.0)),
    )
    loss, figures = objective.compare(scores, jnp.asarray(kept["lengths"]))
    assert float(loss) / 7 == pytest.approx(kept["loss"], rel=1e-5)
    for figure, expected in kept["figures"].items():
        assert float(figures[figure] / 7) == pytest.approx(expected, rel=1e-5, abs=1e-6), figure


def test_figures_of_either_label_are_means_whatever_the_batches():
    rewards, label = jnp.array([1.0, 2.0, 4.0, 8.0]), jnp.array([1.0, 1.0, 0.0, 1.0])
    scores = LogProbs(
        jnp.stack([rewards, 0 * rewards], 1), jnp.zeros((4, 2)), label, jnp.ones(4), 0
    )
    parts = [scores._replace(policy_BP=scores.policy_BP[rows], reference_BP=jnp.zeros((2, 2)),
                             label_B=label[rows], weights_B=jnp.ones(2)).metrics(0.5)
             for rows in (jnp.array([0, 1]), jnp.array([3, 2]))]  # fmt: skip
    total = jax.tree.map(jnp.add, *parts)
    assert float(total["reward_chosen"] / 4) == pytest.approx(0.5 * 11 / 3)
    assert float(total["reward_rejected"] / 4) == pytest.approx(0.5 * 4)
    assert float(parts[0]["logp_rejected"] / 2) == 0


@pytest.mark.parametrize("case", [case for case in OF_TRL if "reward" in case])
def test_rewards_are_learned_as_by_trl(case, monkeypatch):
    kept = OF_TRL[case]
    monkeypatch.setattr(Reward, "predict", lambda self, model, batch: jnp.asarray(kept["policy"]))
    n = len(kept["policy"])
    batch = {"margin": jnp.asarray(kept["margin"]), "weights": jnp.ones(n)}
    sums = Reward(16, kept["options"]["reward_centering"]).loss(None, batch)
    assert float(sums.loss) / n == pytest.approx(kept["loss"], rel=1e-5)
    for figure, expected in kept["figures"].items():
        assert float(sums.metrics[figure]) / n == pytest.approx(expected, rel=1e-5)


def test_reward_is_read_from_the_last_token_of_each_sequence():
    class Last(Log):
        def hidden(self, tokens, positions, segments):
            return jnp.stack([tokens, positions, segments], -1).astype(jnp.float32)

        def pooled(self, x, segments):
            return last_of_row(x, segments)

        def classify(self, x):
            return x[:, :1]

    objective = Reward(4)
    example = record([1, 2], chosen=[3], rejected=[4, 5])
    row = objective.features(example, np.random.default_rng(0))
    assert row["inputs"].tolist() == [1, 2, 3, 0, 1, 2, 4, 5]
    batch = {name: jnp.asarray(values)[None] for name, values in row.items()}
    assert objective.predict(Last(np.zeros((9, 1))), batch).tolist() == [[3, 5]]


def test_label_smoothing_is_the_loss_of_a_part_of_flipped_pairs():
    kind, scores = (
        PREFERENCES["dpo"],
        LogProbs(jnp.array([[3.0, 1.0]]), jnp.zeros((1, 2)), None, 1.0, 0.0),
    )
    flipped = scores._replace(policy_BP=scores.policy_BP[:, ::-1])
    plain = [float(kind.loss(each, options(beta=0.5))[0]) for each in (scores, flipped)]
    found = float(kind.loss(scores, options(beta=0.5, label_smoothing=0.1))[0])
    assert plain[0] == pytest.approx(np.log1p(np.exp(-1.0)))
    assert found == pytest.approx(0.9 * plain[0] + 0.1 * plain[1])


@pytest.fixture
def objective():
    return Preferences("dpo", 6, options(reference="none"))


def test_row_holds_both_sequences_and_completions_alone_are_learned(objective):
    pair = record([1, 2, 3], chosen=[4, 5], rejected=[6, 7, 8, 9, 10, 11])
    row = objective.features(SimpleNamespace(record=pair), np.random.default_rng(0))
    assert row["inputs"].tolist() == [1, 2, 3, 4, 0, 0, 1, 2, 3, 6, 7, 8]
    assert row["targets"].tolist() == [2, 3, 4, 5, 0, 0, 2, 3, 6, 7, 8, 9]  # cut after 7 tokens
    assert row["segment_ids"].tolist() == [1, 1, 1, 1, 0, 0, 2, 2, 2, 2, 2, 2]
    assert row["positions"].tolist() == [0, 1, 2, 3, 0, 0, 0, 1, 2, 3, 4, 5]
    assert row["weights"].tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1]


def test_kto_compares_with_the_completion_of_another_prompt():
    first = record([1, 2], label=False, completion=[3])
    second = record([4], label=True, completion=[5, 6])
    objective = UnpairedPreferences("kto", 4, options(reference="none"))
    example = SimpleNamespace(record=second, previous=first)
    row = objective.features(example, np.random.default_rng(0))
    assert row["inputs"].tolist() == [4, 5, 0, 0, 4, 0, 0, 0]
    assert row["targets"].tolist() == [5, 6, 0, 0, 3, 0, 0, 0]
    assert row["label"] == 1


def test_log_probabilities_are_sums_over_the_completion(objective):
    table = np.random.default_rng(0).normal(size=(12, 12))
    log_probs = table - np.log(np.exp(table).sum(-1, keepdims=True))
    pairs = [record([1, 2], chosen=[3, 4], rejected=[5]), record([7], chosen=[8], rejected=[9, 2])]
    rows = [
        objective.features(SimpleNamespace(record=pair), np.random.default_rng(0)) for pair in pairs
    ]
    batch = {name: jnp.stack([row[name] for row in rows]) for name in rows[0]}
    expected = [
        [log_probs[2, 3] + log_probs[3, 4], log_probs[2, 5]],
        [log_probs[7, 8], log_probs[7, 9] + log_probs[9, 2]],
    ]
    np.testing.assert_allclose(objective.predict(Log(table), batch), expected, rtol=1e-5)


def test_prompts_that_fill_a_sequence_are_skipped_and_reported(make_kind, one_device, capsys):
    experiment, dataset = build_with_data(
        make_kind("dpo decoder", **{"data.sequence_length": 4}), jax.devices()
    )
    (store,) = dataset.train
    kept = experiment.objective.examples(store, training=True)
    assert 0 < len(kept) < len(store)
    skipped = f"skipped {len(store) - len(kept)} of {len(store)} records, whose prompts fill"
    assert skipped in capsys.readouterr().err
    with pytest.raises(UserError, match=r"every prompt .* --config.data.sequence_length=1"):
        Preferences("dpo", 1, options()).examples(store, training=True)
