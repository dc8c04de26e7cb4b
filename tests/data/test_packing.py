from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.data.store import Manifest, TokenStore, token_windows
from lm.errors import UserError


def store_of(lengths: list[int], final_delimiter: bool = False) -> TokenStore:
    """A store in memory, whose token at place i is i."""
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    n_tokens = int(offsets[-1]) + final_delimiter
    manifest = Manifest(2, "memory", "", "", "uint16", n_tokens, len(lengths), 0, 0, 0, None, {})
    return TokenStore(Path(), manifest, np.arange(n_tokens, dtype=np.uint16), offsets)


stores = st.builds(store_of, st.lists(st.integers(1, 12), min_size=1), st.booleans()).filter(
    lambda store: len(store.tokens) > 1
)


@given(stores, st.integers(1, 30), st.booleans())
def test_evaluation_makes_every_token_but_the_first_a_target_once(store, length, isolate):
    examples = token_windows(store, length, length, isolate, drop_remainder=False)
    targets = []
    for i in range(len(examples)):
        example = examples[i]
        assert example.pop("weights").shape == (length,)
        assert {values.shape for values in example.values()} == {(length + 1,)}
        assert {values.dtype for values in example.values()} == {np.dtype(np.int32)}
        real = example["segment_ids"] > 0
        assert not real[1:][~real[:-1]].any()  # padding is at the end
        assert not example["tokens"][~real].any()
        assert not example["positions"][~real].any()
        targets += example["tokens"][1:][real[1:]].tolist()
    assert targets == list(range(1, len(store.tokens)))


@given(stores, st.integers(1, 30), st.booleans())
def test_segments_are_the_documents_and_positions_start_with_them(store, length, drop_remainder):
    places = store.tokens
    document = np.searchsorted(store.offsets, places, side="right")
    examples = token_windows(store, length, length, True, drop_remainder=False)
    for i in range(len(examples)):
        example = examples[i]
        real = example["segment_ids"] > 0
        own = document[i * length : i * length + length + 1]
        np.testing.assert_array_equal(example["segment_ids"][real], own - own[0] + 1)
        begins = np.maximum(store.offsets[own - 1], i * length)
        np.testing.assert_array_equal(example["positions"][real], example["tokens"][real] - begins)


def test_shared_delimiter_starts_a_segment_of_its_own_at_the_end():
    example = token_windows(store_of([3, 2], final_delimiter=True), 6, 6, True, False)[0]
    assert example["segment_ids"].tolist() == [1, 1, 1, 2, 2, 3, 0]
    assert example["positions"].tolist() == [0, 1, 2, 0, 1, 0, 0]


def test_targets_are_of_the_same_document():
    example = token_windows(store_of([3, 2]), 6, 6, True, False)[0]
    assert example["weights"].tolist() == [1, 1, 0, 1, 0, 0]
    example = token_windows(store_of([3, 2]), 6, 6, False, False)[0]
    assert example["weights"].tolist() == [1, 1, 1, 1, 0, 0]


def test_shared_delimiter_is_the_target_that_ends_a_document():
    offsets = np.array([0, 3, 5])
    tokens = np.array([9, 1, 2, 9, 3, 9], np.uint16)
    manifest = Manifest(2, "memory", "", "", "uint16", 6, 2, 0, 0, 0, delimiter=9, checksums={})
    example = token_windows(TokenStore(Path(), manifest, tokens, offsets), 7, 7, True, False)[0]
    assert example["weights"].tolist() == [1, 1, 1, 1, 1, 0, 0]


def test_without_isolation_a_window_is_one_segment():
    example = token_windows(store_of([3, 2]), 3, 1, False, True)[1]
    assert example["tokens"].tolist() == [1, 2, 3, 4]
    assert example["segment_ids"].tolist() == [1, 1, 1, 1]
    assert example["positions"].tolist() == [0, 1, 2, 3]


@given(stores, st.integers(1, 30), st.integers(1, 40))
def test_training_windows_are_full_and_start_at_every_stride(store, length, stride):
    starts = range(0, len(store.tokens) - length, stride)
    if not starts:
        with pytest.raises(UserError, match=r"memory has \d+ tokens.*sequence_length"):
            token_windows(store, length, stride, True, True)
        return
    examples = token_windows(store, length, stride, True, True)
    found = [examples[i]["tokens"].tolist() for i in range(len(examples))]
    assert found == [list(range(start, start + length + 1)) for start in starts]


def test_indices_outside_are_rejected():
    examples = token_windows(store_of([10]), 4, 4, True, True)
    for index in (-1, len(examples)):
        with pytest.raises(IndexError):
            examples[index]


def test_single_token_is_too_few_to_evaluate():
    with pytest.raises(UserError, match="too few"):
        token_windows(store_of([1]), 4, 4, True, False)
