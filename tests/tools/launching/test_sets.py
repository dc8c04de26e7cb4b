"""Sets of overrides, and the names of their runs."""

from __future__ import annotations

import math

import pytest

from lm.errors import UserError
from lm.sweeps.sets import choice, grid, log_uniform, named, product, sampled, uniform, zipped


def test_grid_zip_and_product():
    assert grid({"a": [1, 2], "b": "xy"}) == [
        {"a": 1, "b": "x"},
        {"a": 1, "b": "y"},
        {"a": 2, "b": "x"},
        {"a": 2, "b": "y"},
    ]
    assert zipped({"a": [1, 2], "b": [3, 4]}) == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]
    assert product([{"a": 1}], [{"b": 2}, {"a": 5}]) == [{"a": 1, "b": 2}, {"a": 5}]
    with pytest.raises(UserError, match="different numbers"):
        zipped({"a": [1, 2], "b": [3]})


def test_random_sets_depend_on_the_seed_and_each_key_alone():
    rate = log_uniform(1e-4, 1e-1)
    drawn = sampled({"rate": rate, "dropout": uniform(0.0, 0.3)}, 200, seed=7)
    assert drawn == sampled({"rate": rate, "dropout": uniform(0.0, 0.3)}, 200, seed=7)
    assert drawn != sampled({"rate": rate, "dropout": uniform(0.0, 0.3)}, 200, seed=8)
    alone = sampled({"rate": rate, "kind": choice("a", "b")}, 200, seed=7)
    assert [d["rate"] for d in alone] == [d["rate"] for d in drawn]
    assert {d["kind"] for d in alone} == {"a", "b"}
    logs = [math.log10(d["rate"]) for d in drawn]
    assert min(logs) >= -4
    assert max(logs) <= -1
    for decade in (-4, -3, -2):  # a third each, within four standard deviations
        assert 40 <= sum(decade <= log < decade + 1 for log in logs) <= 93
    with pytest.raises(UserError, match="0 < low"):
        log_uniform(0.0, 1.0)


def test_names_say_what_differs_and_are_folders():
    sets = grid({"optimizer.learning_rate": [0.001, 3e-3], "model.d_model": [64], "seed": [0, 1]})
    assert list(named(sets)) == [
        "learning_rate=0.001,seed=0",
        "learning_rate=0.001,seed=1",
        "learning_rate=0.003,seed=0",
        "learning_rate=0.003,seed=1",
    ]
    assert list(named([{"data.source": "text:a/b.txt"}])) == ["source=text_a_b.txt"]
    same_tail = grid({"optimizer.name": ["lion", "sgd"], "schedule.name": ["step", "wsd"]})
    assert next(iter(named(same_tail))) == "optimizer.name=lion,schedule.name=step"
    with pytest.raises(UserError, match="two runs"):
        named([{"x": "a/b"}, {"x": "a_b"}])
