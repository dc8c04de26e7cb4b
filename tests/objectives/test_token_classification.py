"""Word labels: read from CoNLL files and records, learned at each word's first token."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.config import default
from lm.data.record_store import build_record_store, tokenize_words
from lm.data.records import open_records
from lm.data.special_tokens import SpecialTokens
from lm.data.tokenizer import Template
from lm.data.tokenizers.basic import ByteTokenizer, WordTokenizer
from lm.errors import UserError
from lm.objectives.token_classification import TokenClassification

SPECIAL = SpecialTokens(pad=0, bos=90, eos=91, cls=92, sep=93, mask=94, vocab_size=95)
LABELS = ("O", "B-PER", "I-PER", "B-LOC")
RNG = np.random.default_rng(0)
CONLL = """-DOCSTART- -X- -X- O

Ada NNP B-NP B-PER
Byron NNP I-NP I-PER
left VBD B-VP O

Rome NNP B-NP B-LOC
"""


def open_file(tmp_path, name, text, **settings):
    (tmp_path / name).write_text(text)
    data = default().data
    data.labels = ",".join(LABELS)
    for key, value in settings.items():
        data[key] = value
    return open_records(f"{name.partition('.')[2]}:{tmp_path}/{name}", data)


def test_conll_files_and_lists_of_words_are_the_same_records(tmp_path):
    expected = [
        {"words": "Ada Byron left", "tags": "B-PER I-PER O"},
        {"words": "Rome", "tags": "B-LOC"},
    ]
    records = list(open_file(tmp_path, "a.conll", CONLL))
    assert [record for record, _ in records] == expected
    assert [where.rpartition(":")[2] for _, where in records] == ["3", "7"]
    rows = [
        {"tokens": ["Ada", "Byron", "left"], "ner": ["B-PER", "I-PER", "O"]},
        {"tokens": "Rome", "ner": "B-LOC"},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    columns = {"columns": "words=tokens,tags=ner"}
    assert [record for record, _ in open_file(tmp_path, "a.jsonl", text, **columns)] == expected


def test_white_space_within_a_word_does_not_split_it(tmp_path):
    words = ["10\xa0000", "a\u3000b", "c\x85d", "e\u2028f\x1cg"]
    lines = "".join(f"{word}\t{label} \r\n" for word, label in zip(words, LABELS, strict=True))
    row = json.dumps({"words": words, "tags": list(LABELS)})
    for name, text in (("a.conll", lines), ("a.jsonl", row)):
        records = open_file(tmp_path, name, text)
        record = {"words": " ".join(words), "tags": " ".join(LABELS)}
        assert [found for found, _ in records] == [record]
        store = build_record_store(records, ByteTokenizer(), tmp_path / name[2:])
        objective = TokenClassification(40, LABELS, SPECIAL)
        targets = objective.features(store[0], RNG)
        assert targets["weights"].sum() == len(words)
        assert objective.answers([store], targets["targets"][None]) == [" ".join(LABELS)]


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.conll", "Ada B-PER\nByron\n", "a.conll:1: line 2 is not a word followed by a tag"),
        ("a.conll", "\nAda B-GPE\n", "a.conll:2: label 'B-GPE' is not one of"),
        ("a.conll", "-DOCSTART- O\n\n", "has no usable record"),
        ("a.jsonl", '{"words": ["a", "b"], "tags": ["O"]}\n', "2 words have 1 tags"),
        ("a.jsonl", '{"words": ["a b"], "tags": ["O"]}\n', "words without spaces"),
        ("a.jsonl", '{"words": ["a"], "tags": [0]}\n', "words without spaces"),
    ],
)
def test_bad_row_is_a_one_line_error(tmp_path, name, text, problem):
    with pytest.raises(UserError, match=problem):
        list(open_file(tmp_path, name, text))


def test_target_of_a_word_stands_at_its_first_token(tmp_path):
    records = open_file(tmp_path, "a.conll", CONLL)
    store = build_record_store(records, ByteTokenizer(), tmp_path)
    objective = TokenClassification(12, LABELS, SPECIAL)
    row = objective.features(store[0], RNG)
    assert row["inputs"].tolist() == [92, *b"Ada Byron ", 93]
    assert row["segment_ids"].tolist() == [1] * 12
    assert np.flatnonzero(row["weights"]).tolist() == [1, 4, 10]
    assert row["targets"][[1, 4, 10]].tolist() == [1, 2, 0]
    short = objective.features(store[1], RNG)
    assert short["segment_ids"].tolist() == [1] * 6 + [0] * 6
    # Words that a row of 8 does not hold are answered "O".
    objective = TokenClassification(8, LABELS, SPECIAL)
    outputs = np.full((2, 8), 3)
    assert objective.answers([store], outputs) == ["B-LOC B-LOC O", "B-LOC"]
    assert objective.reference(store[0]) == "B-PER I-PER O"
    # An imported decoder may have an id before the text and none after it.
    objective = TokenClassification(9, LABELS, SPECIAL, Template((7,)))
    row = objective.features(store[0], RNG)
    assert row["inputs"].tolist() == [7, *b"Ada Byro"]
    assert np.flatnonzero(row["weights"]).tolist() == [1, 4]


@settings(deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Z", "C"]), min_size=1), min_size=1))
def test_tokens_of_words_match_the_text(words):
    text = " ".join("".join(words).split() or ["a"])
    found = tokenize_words(text, ByteTokenizer().encode)
    assert found.tokens.tolist() == ByteTokenizer().encode(text).tolist()
    starts = np.cumsum([0, *(len(f" {word}".encode()) for word in text.split(" "))]) - 1
    assert np.unique(found.starts, return_index=True)[1].tolist() == [0, *starts[1:-1]]


def test_word_without_a_token_is_outside(tmp_path):
    records = open_file(tmp_path, "a.conll", CONLL)
    store = build_record_store(records, WordTokenizer.fit(["Ada left"]), tmp_path)
    objective = TokenClassification(8, LABELS, SPECIAL)
    assert objective.features(store[0], RNG)["weights"].sum() == 3  # <unk> is a token


def test_labels_and_room_are_needed():
    config = default()
    config.objective.name, config.data.sequence_length = "token_classification", 2
    with pytest.raises(UserError, match=r"needs --config\.data\.labels"):
        TokenClassification.from_config(config, None)
    config.data.labels = "O,B-PER"
    with pytest.raises(UserError, match="leaves no room"):
        TokenClassification.from_config(config, None)
