"""Order of a mixture whose weights change."""

import json
from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.config import default, validate
from lm.config.mixture_rules import Knot, parse_schedule
from lm.data.mixture import Schedule, continues_mixture, epochs_by_step, shuffle_and_mix
from lm.errors import UserError
from lm.training.trainer import train

weights = st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any)
schedules = st.lists(st.tuples(st.integers(0, 3000), weights), min_size=1, max_size=5).map(
    lambda knots: Schedule(tuple(Knot(r, tuple(map(float, w))) for r, w in sorted(knots)))
)


def exact(schedule, row):
    """Examples of each part before a row, by summing areas exactly."""
    knots = [
        (k.at, [Fraction(w) / Fraction(sum(k.weights)) for w in map(Fraction, k.weights)])
        for k in schedule.knots
    ]
    knots = [(0, knots[0][1]), *knots, (10**9, knots[-1][1])]
    total = [Fraction(0)] * 3
    for (a, at_a), (b, at_b) in pairwise(knots):
        end = min(b, row)
        if end <= a or a == b:
            continue
        share = Fraction(end - a, b - a)
        at_end = [x + share * (y - x) for x, y in zip(at_a, at_b, strict=True)]
        total = [t + (end - a) * (x + y) / 2 for t, x, y in zip(total, at_a, at_end, strict=True)]
    return total


@settings(max_examples=40)
@given(schedules, st.integers(0, 9000))
def test_every_part_keeps_its_share_at_every_row(schedule, n):
    rows = [schedule.locate(i) for i in range(n)]
    for part in range(3):
        assert [j for k, j in rows if k == part] == list(range(sum(k == part for k, _ in rows)))
    counts = np.bincount([k for k, _ in rows], minlength=3)
    expected = exact(schedule, n)
    np.testing.assert_allclose(schedule.examples_before(n), [float(x) for x in expected], atol=1e-6)
    # An example is at most half a row early or late by its own count, and so are the others'.
    assert all(abs(count - float(x)) <= 2 for count, x in zip(counts, expected, strict=True))


@given(schedules, st.integers(0, 10**7))
def test_rows_are_found_by_random_access(schedule, row):
    fresh = Schedule(schedule.knots)
    around = [schedule.locate(i) for i in range(max(row - 3, 0), row + 3)]
    assert fresh.locate(row) in around
    assert len(set(around)) == len(around)


def test_weights_change_linearly_and_at_once():
    knots = parse_schedule("0: 1 0; 1000: 1 0; 2000: 0 1; 3000: 0 1; 3000: 3 1", 2)
    schedule = Schedule(knots)
    parts = np.array([schedule.locate(i)[0] for i in range(5000)])
    assert not parts[:1000].any()
    assert parts[2000:3000].all()
    assert abs(parts[1000:2000].mean() - 0.5) < 0.01
    assert abs(parts[3000:].mean() - 0.25) < 0.01
    assert schedule.epochs(5000, [1000, 4000]) == pytest.approx([3.0, 0.5])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no weights"),
        ("0: 1", "1 weights for 2 sources"),
        ("5: 1 1; 4: 1 1", "4 does not"),
        ("-1: 1 1", "-1 does not"),
        (f"0: 1 1; {'9' * 400}: 1 1", "at most 1e.30, and 9"),
        ("0: 0 0", "not all 0"),
        ("0: 1 nan", "0 to 1e.30"),
        ("0: 1 -1", "0 to 1e.30"),
        ("0 1 1", "expected STEP"),
        ("x: 1 1", "expected STEP"),
    ],
)
def test_wrong_schedule_is_named(text, message):
    with pytest.raises(UserError, match=message):
        parse_schedule(text, 2)


@pytest.fixture
def two_texts(tmp_path):
    for name, letter in (("a.txt", "a"), ("b.txt", "b")):
        (tmp_path / name).write_text((letter * 19 + "\n") * 100)
    return tmp_path


@pytest.mark.usefixtures("one_device")
def test_scheduled_mixture_is_trained_stopped_and_resumed(two_texts, tiny_config, tmp_path):
    def run(folder, **values):
        sources = ",".join(f"text:{two_texts / name}" for name in ("a.txt", "b.txt"))
        config = tiny_config(
            data__source=sources,
            data__validation_source=sources,
            data__schedule="0: 1 0; 4: 1 0; 4: 0 1",
            data__batch_size=4,
            eval__by_source=True,
            train__steps=8,
            **values,
        )
        train(config, folder)
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    whole = run(tmp_path / "whole")
    epochs = [
        [row[f"epoch/text:{two_texts / n}"] for n in ("a.txt", "b.txt")]
        for row in whole
        if "loss" in row
    ]
    assert all(b == 0 for _, b in epochs[:4])
    assert epochs[-1][0] == epochs[3][0] == pytest.approx(epochs[-1][1])
    last = whole[-1]
    parts = [last[f"eval/validation/text:{two_texts / n}/loss"] for n in ("a.txt", "b.txt")]
    assert np.mean(parts) == pytest.approx(last["eval/validation/loss"], rel=1e-5)
    run(tmp_path / "cut", train__stop_at=5)
    again = run(tmp_path / "cut")
    losses = [[row["loss"] for row in rows if "loss" in row] for rows in (whole, again)]
    assert losses[0] == losses[1]


def test_passes_over_each_corpus_are_kept(two_texts):
    config = default()
    config.data.epochs = (1.0, 3.0)
    parts = [range(50), range(100)]
    mixed = shuffle_and_mix(parts, SimpleNamespace(weights=()), config)
    drawn = [mixed[i] for i in range(350)]
    assert len(drawn) == 350
    schedule = mixed._schedule
    assert schedule.epochs(350, [50, 100]) == pytest.approx([1.0, 3.0])


def test_passes_over_a_corpus_that_is_two_parts_are_added():
    config = default()
    config.data.schedule = "0: 1 3"
    store = SimpleNamespace(manifest=SimpleNamespace(source="text:a"))
    dataset = SimpleNamespace(train=(store, store))
    epochs = epochs_by_step([range(40), range(40)], dataset, config.data, 0)
    assert epochs(10)["epoch/text:a"] == pytest.approx(10 * config.data.batch_size / 40)


@pytest.mark.parametrize(
    ("source", "schedule", "step", "same"),
    [
        ("text:a", "0: 1 0; 5: 1 0; 9: 0 1", 5, True),
        ("text:a", "0: 2 0; 5: 7 0; 5: 0 1", 5, True),
        ("text:a", "0: 1 0; 5: 1 0; 9: 0 1", 6, False),
        ("text:a", "", 5, False),
        ("text:b", "0: 1 0", 5, False),
        ("text:a,text:b", "0: 1 0; 4: 0 1; 8: 0 1; 9: 1 0", 8, True),
        ("text:a,text:b", "0: 1 0; 2: 0.5 0.5; 4: 0 1; 9: 1 0", 4, True),
        ("text:a,text:b", "0: 1 0; 2: 0 1; 4: 0 1", 4, False),
        ("text:b,text:a", "0: 1 0; 4: 0 1", 4, False),
    ],
)
def test_only_the_future_of_a_mixture_may_change(source, schedule, step, same):
    before, after = default().data, default().data
    before.source, after.source = source, "text:a,text:b"
    before.schedule = "0: 1 0; 4: 0 1" if "," in source else ""
    after.schedule = schedule
    assert continues_mixture(before, after, step) == same
    if not before.schedule:  # a run of a version without the key
        with before.unlocked():
            del before.schedule
        assert continues_mixture(before, after, step) == same


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data__epochs": (1e308, 1e308)}, "at most 1e.30"),
        ({"data__schedule": "0: 1e308 1"}, "0 to 1e.30"),
        ({"data__schedule": "0: 1"}, "1 weights for 2 sources"),
        ({"data__schedule": "0: 1 1", "data__weights": (1, 1)}, "set only one of them"),
        ({"data__epochs": (1.0,)}, "has 1 numbers for 2 corpora"),
        ({"data__epochs": (1.0, 0.0)}, "every epoch must be above 0"),
    ],
)
def test_keys_of_a_mixture_that_do_not_fit_are_named(tiny_config, values, message):
    with pytest.raises(UserError, match=message):
        validate(tiny_config(data__source="text:a,text:b", **values))
