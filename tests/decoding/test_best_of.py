"""Best of n: samples of a prompt ordered by reward."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from runs import write_run

from lm.cli import main
from lm.decoding.best_of import BestOf
from lm.decoding.generated import Generation
from lm.errors import UserError
from lm.runs.reward_model import RewardModel


def test_samples_are_ordered_by_reward_and_withheld_ones_come_last():
    asked = []

    def scores(pairs):
        asked.append(pairs)
        return np.array([len(text) for _, text in pairs], np.float32)

    def sample(repeated, start):
        texts = ["no", "longest", "hidden text", "one", "a", "three"]
        assert repeated == ["p"] * 3 + ["q"] * 3
        made = [Generation(text, None, text.startswith("hidden")) for text in texts]
        return iter([[one] for one in made[start:]])

    best_of, done = BestOf(3, SimpleNamespace(scores=scores)), []
    found = list(best_of.ordered(["p", "q"], 0, sample, done.append))
    assert [[one.text for one in made] for made in found] == [
        ["longest", "no", "hidden text"],
        ["three", "one", "a"],
    ]
    assert found[1][0].score == 5
    assert asked[0][0] == ("p", "no")
    assert done == [1, 1]
    (last,) = best_of.ordered(["p", "q"], 1, sample, done.append)
    assert last == found[1]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--best_of", "2"], "--best_of and --reward_model must be given together"),
        (["--reward_model", "runs/reward"], "--best_of and --reward_model must be given together"),
        (["--best_of", "2", "--reward_model", "runs/reward", "--greedy"], "omit --greedy"),
    ],
)
def test_invalid_best_of_options_are_one_line_errors(capsys, options, problem):
    assert main(["generate", "--workdir", "runs/any", "--prompt", "a", *options]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: ")
    assert problem in error


def test_run_that_is_no_reward_model_is_named(tmp_path):
    with pytest.raises(UserError, match="its objective is causal, not reward"):
        RewardModel(str(write_run(tmp_path / "run", {}, [1.0])))
    with pytest.raises(UserError, match=r"no run in .*nowhere"):
        RewardModel(str(tmp_path / "nowhere"))
