"""Parallel streams through one text: Zaremba et al. 2014, section 3."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lm.data.batches import Batches
from lm.data.contiguous import ContiguousRows, contiguous_rows


class Windows:
    """Windows 1 … n; a 0 is no window."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        if not 0 <= index < self.n:
            raise IndexError(index)
        return {"tokens": np.full(3, index + 1), "weights": np.ones(2, np.float32)}


def grid(n, batch_size, drop_remainder):
    """The numbers of the windows and the marks of fresh rows, [batches, rows] each."""
    examples = ContiguousRows(Windows(n), batch_size, drop_remainder)
    found = [examples[i] for i in range(len(examples))]
    shape = (examples.n_batches, batch_size)
    return (
        np.array([example["tokens"][0] for example in found]).reshape(shape),
        np.array([example["fresh"] for example in found]).reshape(shape),
    )


sizes = st.integers(1, 60), st.integers(1, 9), st.booleans()


@given(*sizes)
def test_every_row_continues_its_part(n, batch_size, drop_remainder):
    numbers, _ = grid(n, batch_size, drop_remainder)
    for row in numbers.T:
        there = row[row > 0]
        assert (np.diff(there) == 1).all()
        assert (row[len(there) :] == 0).all()  # nothing follows padding


@given(*sizes)
def test_every_window_comes_once_but_for_a_dropped_remainder(n, batch_size, drop_remainder):
    numbers, _ = grid(n, batch_size, drop_remainder)
    seen = sorted(numbers[numbers > 0])
    if not drop_remainder:
        assert seen == list(range(1, n + 1))
    elif n >= batch_size:
        assert seen == list(range(1, n - n % batch_size + 1))
        assert (numbers > 0).all()
    else:  # fewer windows than rows: still used
        assert seen == list(range(1, n + 1))


@given(*sizes)
def test_rows_are_fresh_in_the_first_batch_only(n, batch_size, drop_remainder):
    _, fresh = grid(n, batch_size, drop_remainder)
    assert (fresh[0] == 1).all()
    assert (fresh[1:] == 0).all()


def test_seven_windows_in_three_rows():
    numbers, _ = grid(7, 3, drop_remainder=False)
    assert numbers.tolist() == [[1, 4, 7], [2, 5, 0], [3, 6, 0]]
    numbers, _ = grid(7, 3, drop_remainder=True)
    assert numbers.tolist() == [[1, 3, 5], [2, 4, 6]]


def test_padding_has_the_shapes_and_types_of_a_window_and_no_weight():
    examples = ContiguousRows(Windows(1), 2, drop_remainder=False)
    window, padding = examples[0], examples[1]
    for name, values in window.items():
        assert padding[name].shape == values.shape
        assert padding[name].dtype == values.dtype
    assert not padding["weights"].any()


def test_training_starts_again_after_the_last_batch():
    examples = contiguous_rows([Windows(7)], 3, endless=True)
    batches = Batches(examples, lambda example, _: example, 3, seed=0)
    found = [batches.rows(step, range(3)) for step in range(5)]
    assert [batch["tokens"][:, 0].tolist() for batch in found[:3]] == [
        [1, 3, 5],
        [2, 4, 6],
        [1, 3, 5],
    ]
    assert [batch["fresh"].tolist() for batch in found] == [
        [step % 2 == 0] * 3 for step in range(5)
    ]


def test_evaluation_ends():
    examples = contiguous_rows([Windows(7)], 3, endless=False)
    assert len(Batches(examples, lambda example, _: example, 3, seed=0)) == 3
