"""Agreement of processes: the message names the differing process and value."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lm.parallel.agreement import disagreements, software

FACTS = st.dictionaries(st.sampled_from("abcd"), st.integers(0, 2), max_size=4)


@given(st.lists(FACTS, min_size=1, max_size=4))
def test_exactly_the_processes_that_differ_from_the_first_are_named(facts):
    lines = disagreements(facts)
    named = {int(line.split()[1]) for line in lines}
    assert named == {i for i, each in enumerate(facts) if each != facts[0]}


def test_line_says_what_differs_and_the_two_values():
    (line,) = disagreements([{"rate": 0.1, "seed": 0}, {"rate": 0.5, "seed": 0}])
    assert line == "process 1 differs from process 0 in rate (0.5, there 0.1)"
    (line,) = disagreements([{"rate": 0.1}, {}])
    assert line == "process 1 differs from process 0 in rate (missing, there 0.1)"


def test_many_differences_stay_one_line():
    (line,) = disagreements([{}, {str(i): i for i in range(300)}])
    assert line.endswith("295 more")
    assert len(line) < 300


def test_software_names_versions_and_the_code():
    assert {"jax", "flax", "code of lm"} <= software().keys()
