"""Preference records: results and refusals of rows, and the tokens of completions."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lm.config import default
from lm.data.dataset import open_dataset
from lm.errors import UserError

PAIRS, LABELLED = ("chosen", "rejected"), ("completion", "label")


@pytest.fixture
def read(tmp_path):
    """Return the records of rows as their objective reads them, bytes being tokens."""

    def read(*rows, columns=PAIRS, data_columns="", bad_rows="error"):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = default().data
        data.source, data.tokenizer = f"jsonl:{path}", "byte"
        data.columns = data_columns
        data.bad_rows = bad_rows
        dataset = open_dataset(data, columns)
        (store,) = dataset.train
        return list(store), dataset.tokenizer

    return read


def user(text):
    return {"role": "user", "content": text}


def says(text):
    return {"role": "assistant", "content": text}


def test_texts_are_tokenized_together_and_end_with_eos(read):
    (record,), tokenizer = read({"prompt": "Say ", "chosen": "yes", "rejected": "no"})
    found = {name: tokenizer.decode(ids.tolist()) for name, ids in record.tokens.items()}
    assert found == {"prompt": "Say ", "chosen": "yes", "rejected": "no"}
    for name in PAIRS:
        assert record.tokens[name][-1] == tokenizer.eos_id


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue", "The sky is green", "The sky is"),
        ("yes, it is", "yes", "ye"),
        ([user("a"), says("b")], [user("a"), says("c")], [user("a")]),
        ([user("a"), says("b"), user("c"), says("d")], [user("a"), says("e")], [user("a")]),
    ],
)
def test_prompt_is_a_prefix_of_whole_texts_and_conversations(read, chosen, rejected, prompt):
    (record,), _ = read({"chosen": chosen, "rejected": rejected})
    n = len(prompt)
    assert record.raw == {"prompt": prompt, "chosen": chosen[n:], "rejected": rejected[n:]}


def test_messages_are_rendered_and_a_text_becomes_one(read):
    given = {"prompt": [user("Hi")], "chosen": [says("Hello.")], "rejected": "No."}
    (record,), tokenizer = read(given)
    assert record.raw["rejected"] == [says("No.")]
    prompt, chosen = (tokenizer.decode(record.tokens[k].tolist()) for k in ("prompt", "chosen"))
    assert "Hi" in prompt
    assert "assistant" in prompt  # what an answer follows is part of the prompt
    assert chosen.startswith("Hello.")
    assert len(chosen) > len("Hello.")  # the end of the turn


def test_unpaired_rows_keep_their_labels_and_pairs_give_two_each(read):
    rows = [
        {"prompt": "a ", "completion": "b", "label": True},
        {"prompt": "a ", "completion": "c", "label": 0},
        {"prompt": "a ", "completion": "d", "label": "False"},
    ]
    records, _ = read(*rows, columns=LABELLED)
    assert [record.raw["label"] for record in records] == [True, False, False]
    pairs = [{"prompt": f"{i} ", "chosen": "good", "rejected": "bad"} for i in range(2)]
    records, _ = read(*pairs, columns=LABELLED)
    found = [(r.raw["prompt"], r.raw["completion"], r.raw["label"]) for r in records]
    assert found == [
        ("0 ", "good", True), ("1 ", "good", True), ("0 ", "bad", False), ("1 ", "bad", False)
    ]  # fmt: skip


PAIR = {"prompt": "a ", "chosen": "b", "rejected": "c"}
ROW = {"prompt": "a ", "completion": "b", "label": 1}


@pytest.mark.parametrize(
    ("row", "columns", "problem"),
    [
        ({"prompt": "a", "chosen": "b"}, PAIRS, "no column 'rejected' (available: prompt, chosen)"),
        (PAIR | {"rejected": "b"}, PAIRS, "chosen and rejected are equal"),
        (PAIR | {"chosen": " \n"}, PAIRS, "'chosen' is empty"),
        (PAIR | {"rejected": None}, PAIRS, "no column 'rejected'"),
        (PAIR | {"rejected": 3}, PAIRS, "'rejected' is of type int, not a string"),
        (PAIR | {"rejected": []}, PAIRS, "'rejected' is empty"),
        (PAIR | {"chosen": [user("x")]}, PAIRS, "'chosen' does not end with an assistant message"),
        (PAIR | {"chosen": [{"role": "judge", "content": "x"}]}, PAIRS, "unknown role 'judge'"),
        (PAIR | {"margin": "wide"}, PAIRS, "margin 'wide' is not a number"),
        (PAIR | {"chosen": "\ud83d"}, PAIRS, "'chosen' is not UTF-8"),
        (ROW | {"label": "good"}, LABELLED, "label 'good' is neither true nor false"),
        ({"prompt": "a", "completion": "b"}, LABELLED, "no column 'label'"),
        (ROW | {"completion": ""}, LABELLED, "'completion' is empty"),
    ],
)
def test_bad_row_is_a_one_line_error_and_can_be_skipped(read, row, columns, problem):
    with pytest.raises(UserError) as raised:
        read(row, columns=columns)
    assert problem in str(raised.value)
    assert "rows.jsonl:1: " in str(raised.value)
    assert "\n" not in str(raised.value)
    good = PAIR if columns == PAIRS else ROW
    records, _ = read(row, good, columns=columns, bad_rows="skip")
    assert len(records) == 1


def test_columns_may_have_other_names(read):
    given = {"question": "a ", "better": "b", "worse": "c", "strength": 2}
    names = "prompt=question,chosen=better,rejected=worse,margin=strength"
    (record,), _ = read(given, data_columns=names)
    assert record.raw == {"prompt": "a ", "chosen": "b", "rejected": "c", "margin": 2.0}


def test_empty_prompt_becomes_the_start_token(read):
    (record,), tokenizer = read({"prompt": "", "chosen": "b", "rejected": "c"})
    start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    np.testing.assert_array_equal(record.tokens["prompt"], [start])
