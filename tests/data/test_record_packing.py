import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lm.data.record_store import pack_records


@st.composite
def problems(draw):
    k = draw(st.integers(1, 3))
    n = draw(st.integers(0, 200))
    lengths = draw(arrays(np.int64, (n, k), elements=st.integers(0, 12)))
    limits = draw(st.lists(st.integers(1, 20), min_size=k, max_size=k))
    return lengths, limits, draw(st.integers(0, 3))


@given(problems())
def test_every_record_is_in_one_pack_and_limits_are_kept(problem):
    lengths, limits, seed = problem
    packs = pack_records(lengths, limits, seed)
    members = [packs[i] for i in range(len(packs))]
    assert sorted(np.concatenate([np.zeros(0, int), *members]).tolist()) == list(
        range(len(lengths))
    )
    for member in members:
        assert len(member)
        assert len(member) == 1 or (lengths[member].sum(0) <= limits).all()
    again = pack_records(lengths, limits, seed)
    np.testing.assert_array_equal(packs.indices, again.indices)
    np.testing.assert_array_equal(packs.offsets, again.offsets)


def test_order_comes_from_the_seed():
    lengths = np.ones((50, 1), int)
    assert (
        pack_records(lengths, [5], 0).indices.tolist()
        != pack_records(lengths, [5], 1).indices.tolist()
    )


def test_record_that_is_too_long_is_alone():
    lengths = np.asarray([[9, 0], [0, 0], [0, 1], [1, 9]])
    packs = pack_records(lengths, [8, 8], 0)
    assert sorted(sorted(packs[i].tolist()) for i in range(len(packs))) == [[0], [1, 2], [3]]
    with pytest.raises(IndexError):
        packs[3]


def test_records_go_to_the_first_pack_with_room():
    """First-fit written down plainly, for fewer packs than may be open."""
    lengths = np.random.default_rng(1).integers(1, 60, (60, 1))
    expected: list[list[int]] = []
    for index in np.random.default_rng(7).permutation(60).tolist():
        fitting = (p for p in expected if lengths[[*p, index]].sum() <= 100)
        pack_of = next(fitting, None)
        if pack_of is None:
            expected.append([index])
        else:
            pack_of.append(index)
    packs = pack_records(lengths, [100], 7)
    assert [packs[i].tolist() for i in range(len(packs))] == expected


def test_packs_are_nearly_full():
    lengths = np.random.default_rng(0).integers(5, 30, (5_000, 2))
    packs = pack_records(lengths, [256, 256], 0)
    fill = packs.fill(lengths, [256, 256])
    assert fill.tolist() == (lengths.sum(0) / (len(packs) * 256)).tolist()
    assert fill.min() > 0.93


def test_records_that_fill_one_limit_do_not_hold_packs_open():
    """Half of the records are too long on one side; the others still fill their packs."""
    lengths = np.asarray([[20, 1], [4, 4]] * 2_000)
    packs = pack_records(lengths, [16, 16], 0)
    assert len(packs) == 2_000 + 500


@pytest.mark.parametrize(("limits", "expected"), [([4], [0.75]), ([10], [0.7])])
def test_fill_counts_what_is_cut_off_as_unused(limits, expected):
    lengths = np.asarray([[5], [2]])
    assert pack_records(lengths, limits, 0).fill(lengths, limits).tolist() == expected
