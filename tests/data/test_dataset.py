import pytest

from lm.data.dataset import open_dataset, open_tokenizer
from lm.data.splits import open_split
from lm.errors import UserError


def test_mixture_opens_with_its_validation_parts(make_data, tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghij" * 10)
    (tmp_path / "b.jsonl").write_text('{"text": "xyz"}\n' * 10)
    data = make_data(
        source="text:a.txt, jsonl:b.jsonl", weights=(0.5, 0.5), validation_fraction=0.1
    )
    dataset = open_dataset(data)
    assert [store.manifest.n_documents for store in dataset.train] == [1, 9]
    assert [store.manifest.n_bytes for store in dataset.train] == [90, 27]
    assert [store.manifest.n_bytes for store in dataset.validation] == [10, 3]
    assert dataset.weights == (0.5, 0.5)
    assert dataset.tokenizer.vocab_size == 257


def test_validation_source_replaces_holding_out(make_data, tmp_path):
    (tmp_path / "a.txt").write_text("train")
    (tmp_path / "b.txt").write_text("validation")
    data = make_data(source="text:a.txt", validation_source="text:b.txt", validation_fraction=0.5)
    dataset = open_dataset(data)
    assert [store.manifest.n_bytes for store in dataset.train] == [5]
    assert [store.manifest.n_bytes for store in dataset.validation] == [10]


def test_no_validation_text_is_no_error(make_data, tmp_path):
    (tmp_path / "a.txt").write_text("train")
    assert open_dataset(make_data(source="text:a.txt")).validation == ()


def test_characters_of_the_validation_text_do_not_enter_the_alphabet(make_data, tmp_path):
    (tmp_path / "a.txt").write_text("aaaabbbbz")
    data = make_data(source="text:a.txt", tokenizer="char", validation_fraction=0.2)
    with pytest.raises(UserError, match=r"'z' \(U\+007A\)"):
        open_dataset(data)


def test_fingerprint_tells_what_changed(make_data, tmp_path):
    path = tmp_path / "a.txt"
    data = make_data(source="text:a.txt", tokenizer="char", validation_source="text:a.txt")
    path.write_text("abc")
    first = open_dataset(data).fingerprint
    assert set(first) == {"tokenizer", "train text:a.txt", "validation text:a.txt"}
    assert open_dataset(data).fingerprint == first
    path.write_text("abccba")
    second = open_dataset(data).fingerprint
    changed = {name for name in first if first[name] != second[name]}
    assert changed == {"train text:a.txt", "validation text:a.txt"}
    path.write_text("abcd")
    assert open_dataset(data).fingerprint["tokenizer"] != first["tokenizer"]


def rows(store):
    return [record.raw["text"] for record in store]


@pytest.fixture
def records(make_data, tmp_path):
    """Make data sections of two files of records."""
    for name, letters in (("a", "abcdefghij"), ("b", "xyz")):
        (tmp_path / f"{name}.tsv").write_text("text\n" + "".join(f"{x}\n" for x in letters))
    return lambda **changes: make_data(**{"source": "tsv:a.tsv", **changes})


def test_records_are_validated_on_a_source_of_their_own(records):
    dataset = open_dataset(records(validation_source="tsv:b.tsv"), columns=("text",))
    assert [rows(store) for store in dataset.train] == [list("abcdefghij")]
    assert [rows(store) for store in dataset.validation] == [["x", "y", "z"]]
    assert set(dataset.fingerprint) == {"tokenizer", "train tsv:a.tsv", "validation tsv:b.tsv"}
    assert open_dataset(records(), columns=("text",)).validation == ()


def test_part_of_the_records_of_each_source_is_held_out(records):
    data = records(source="tsv:a.tsv,tsv:b.tsv", validation_fraction=0.4)
    dataset = open_dataset(data, columns=("text",))
    assert [store.n_tokens for store in dataset.train] == [6, 1]
    assert [store.n_tokens for store in dataset.validation] == [4, 2]
    for train, held_out, letters in zip(
        dataset.train, dataset.validation, ("abcdefghij", "xyz"), strict=True
    ):
        assert sorted(rows(train) + rows(held_out)) == list(letters)
        assert rows(held_out) == sorted(rows(held_out))
    assert rows(dataset.validation[0]) != list("ghij")  # files of tasks are often sorted
    stores = open_split(data, "validation", dataset.tokenizer, columns=("text",))
    assert [rows(store) for store in stores] == [rows(store) for store in dataset.validation]


def test_tokenizer_is_fitted_to_the_texts_of_records(records):
    data = records(tokenizer="words", validation_source="tsv:b.tsv")
    assert set(open_tokenizer(data, columns=("text",)).words) == {"<eos>", "<unk>", *"abcdefghij"}


def test_split_that_is_not_named_is_reported(records):
    data, tokenizer = records(), open_tokenizer(records())
    for split in ("validation", "test"):
        with pytest.raises(UserError, match=f"no {split} data; set --config.data.{split}_source"):
            open_split(data, split, tokenizer, columns=("text",))
    data = records(test_source="tsv:b.tsv")
    (store,) = open_split(data, "test", tokenizer, columns=("text",))
    assert rows(store) == ["x", "y", "z"]
