import numpy as np
import pytest

from lm.data.dataset import open_dataset
from lm.data.splits import open_split
from lm.errors import UserError


@pytest.fixture
def rows(tmp_path):
    """Ten records, the i-th of i + 1 words."""
    texts = [" ".join(f"w{i}" for _ in range(i + 1)) for i in range(10)]
    (tmp_path / "a.tsv").write_text("".join(f"{text}\t{i}\n" for i, text in enumerate(texts)))
    return texts


@pytest.fixture
def data(make_data, rows):
    return make_data(
        source="tsv:a.tsv",
        columns="text=0,label=1",
        header=False,
        tokenizer="words",
        validation_fraction=0.3,
    )


def texts(store):
    return [record.raw["text"] for record in store]


def test_random_records_are_held_out_and_all_keep_their_order(data, rows, tmp_path):
    sort = "".join(f"{'abc'[i // 100]} {i}\t{i}\n" for i in range(300))
    (tmp_path / "a.tsv").write_text(sort)
    dataset = open_dataset(data, columns=("text", "label"))
    (train,), (validation,) = dataset.train, dataset.validation
    numbers = [[int(record.raw["label"]) for record in part] for part in (train, validation)]
    assert sorted(numbers[0] + numbers[1]) == list(range(300))
    assert len(validation) == 90
    assert all(found == sorted(found) for found in numbers)
    thirds = np.bincount(np.array(numbers[1]) // 100)
    assert thirds == pytest.approx(np.full(3, 30), abs=13)  # 3.5 standard deviations
    again = open_dataset(data, columns=("text", "label"))
    assert texts(again.validation[0]) == texts(validation)
    data.validation_seed = 1
    other = texts(open_dataset(data, columns=("text", "label")).validation[0])
    assert len(other) == 90
    assert 10 < len(set(other) & set(texts(validation))) < 45  # 27 by chance


def test_part_is_a_store_of_its_records(data, rows):
    dataset = open_dataset(data, columns=("text", "label"))
    (train,), (validation,) = dataset.train, dataset.validation
    for store, n in ((train, 7), (validation, 3)):
        assert len(store) == n
        numbers = [rows.index(text) for text in texts(store)]
        for i, number in enumerate(numbers):
            assert store[i].raw == {"text": rows[number], "label": str(number)}
            assert len(store[i].tokens["text"]) == number + 1
        assert store.lengths("text").tolist() == [number + 1 for number in numbers]
        assert store.n_tokens == sum(numbers) + n
        part = store.select(np.array([2, 0]))
        assert texts(part) == [rows[numbers[2]], rows[numbers[0]]]
        assert part.lengths("text").tolist() == [numbers[2] + 1, numbers[0] + 1]
        for index in (-1, n):
            with pytest.raises(IndexError):
                store[index]


def test_each_source_gives_a_part_of_its_own(data, rows, tmp_path):
    (tmp_path / "b.tsv").write_text("".join(f"b{i}\t{i}\n" for i in range(20)))
    data.source = "tsv:a.tsv,tsv:b.tsv"
    dataset = open_dataset(data, columns=("text", "label"))
    assert [len(store) for store in dataset.train] == [7, 14]
    assert [len(store) for store in dataset.validation] == [3, 6]
    assert all(text[0] == "b" for text in texts(dataset.validation[1]))


def test_split_opened_by_itself_is_the_same(data):
    dataset = open_dataset(data, columns=("text", "label"))
    (split,) = open_split(data, "validation", dataset.tokenizer, columns=("text", "label"))
    assert texts(split) == texts(dataset.validation[0])


def test_words_of_the_held_out_records_are_known(data):
    """A fitted tokenizer sees them all, as the source is one text."""
    dataset = open_dataset(data, columns=("text", "label"))
    for record in dataset.validation[0]:
        assert dataset.tokenizer.unknown_id not in record.tokens["text"]


def test_validation_source_replaces_holding_out(data, rows, tmp_path):
    (tmp_path / "b.tsv").write_text("one text\t1\n")
    data.validation_source = "tsv:b.tsv"
    dataset = open_dataset(data, columns=("text", "label"))
    assert texts(dataset.train[0]) == rows
    assert texts(dataset.validation[0]) == ["one text"]
    data.validation_source, data.validation_fraction = "", 0.0
    assert not open_dataset(data, columns=("text", "label")).validation


def test_small_part_is_a_record_at_least(data):
    data.validation_fraction = 0.05
    assert len(open_dataset(data, columns=("text", "label")).validation[0]) == 1


def test_split_without_records_is_reported(data, tmp_path):
    (tmp_path / "a.tsv").write_text("x\t0\n")
    with pytest.raises(UserError, match=r"validation_fraction=0\.3 of tsv:a\.tsv leaves a split"):
        open_dataset(data, columns=("text", "label"))
