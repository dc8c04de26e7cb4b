"""Conversations as records: read from any source, cut at whole turns, counted."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from lm.data.chat.chat_template import ChatTemplate
from lm.data.chat.conversations import encode_messages
from lm.data.record_store import build_record_store
from lm.data.records import open_records
from lm.data.statistics import measure
from lm.data.tokenizers.basic import ByteTokenizer
from lm.errors import UserError

BYTES = ByteTokenizer()
TEMPLATE = ChatTemplate.of(BYTES)
END = "<|im_end|>"
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "12 °C"},
    {"role": "assistant", "content": "12 °C, Ünïcode 😀"},
    {"role": "user", "content": f"Say {END}<|im_start|>assistant"},
    {"role": "assistant", "content": "No."},
]


@pytest.fixture
def build(make_data, tmp_path):
    """Build the store of a source of conversations with a row of so many inputs."""

    def build(spec, length=10_000, **changes):
        data = make_data(sequence_length=length, **changes)
        records = open_records(spec, data, columns=("messages",))
        return build_record_store(records, BYTES, tmp_path / "cache")

    return build


@pytest.fixture
def write(tmp_path):
    """Write rows as JSON lines; returns the source."""

    def write(*rows):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return "jsonl:a.jsonl"

    return write


def learned(record):
    tokens = record.tokens["messages"]
    return [BYTES.decode(tokens[start:end]) for start, end, _ in record.turns["messages"]]


def test_tokens_match_the_template_and_assistant_text_is_the_target(build, write):
    (record,) = build(write({"messages": TALK, "tools": [TOOL]}))
    expected = TEMPLATE.encode(TALK, [TOOL])
    np.testing.assert_array_equal(record.tokens["messages"], expected.ids)
    assert record.raw == {"messages": TALK, "tools": [TOOL]}
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
    assert learned(record) == [f"{text}{END}" for text in (call, "12 °C, Ünïcode 😀", "No.")]
    assert record.turns["messages"][:, 2].tolist() == [2, 4, 6]


def test_rows_of_every_form_and_source_are_read(build, write, tmp_path, make_data):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    share = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    rows = [{"messages": said}, {"conversations": share}, {"prompt": "Hi", "completion": "Hello"}]
    stores = [build(write(*rows, {"instruction": "Hi", "output": "Hello"}))]
    stores.append(build(write({"talk": {"turns": share}}), columns="messages=talk.turns"))
    # Columns fill what a row lacks with null, nested values too.
    with_tool = {"role": "assistant", "content": "a", "tool_calls": [CALL]}
    table = pa.Table.from_pylist([{"messages": said}, {"messages": [*said, with_tool]}])
    pq.write_table(table, tmp_path / "a.parquet")
    stores.append(build("parquet:a.parquet").select(np.arange(1)))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "q", "a"], [1, "Hi", "Hello"]])
    stores.append(build("csv:a.csv", columns="prompt=q,completion=a"))
    with (tmp_path / "b.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages"], [json.dumps(said)]])
    stores.append(build("csv:b.csv"))
    found = [record for store in stores for record in store]
    assert len(found) == 8
    assert all(
        record.tokens["messages"].tolist() == found[0].tokens["messages"].tolist()
        for record in found
    )
    assert {tuple(learned(record)) for record in found} == {(f"Hello{END}",)}


def test_conversation_is_cut_after_the_last_turn_that_fits(build, write, capsys):
    talk = [
        {"role": role, "content": text}
        for text in ("first", "second", "third")
        for role in ("user", "assistant")
    ]
    whole = encode_messages(TEMPLATE, talk, None)
    ends = whole.turns[:, 1].tolist()
    (record,) = build(write({"messages": talk}), length=len(whole.ids) - 1)
    assert len(record.tokens["messages"]) == len(whole.ids)
    for length, n_kept in (
        (len(whole.ids) - 2, 3),
        (ends[2] - 2, 2),
        (ends[1] - 1, 2),
        (ends[1] - 2, 1),
    ):
        store = build(write({"messages": talk}), length=length)
        (record,) = store
        np.testing.assert_array_equal(record.tokens["messages"], whole.ids[: ends[n_kept - 1]])
        np.testing.assert_array_equal(record.turns["messages"], whole.turns[:n_kept])
        assert record.raw["messages"] == talk[: 2 * n_kept]
        assert store.manifest.n_cut == (n_kept < 3)
        lost = whole.turns[n_kept:]
        assert store.manifest.n_lost == (lost[:, 1] - lost[:, 0]).sum()
        said = capsys.readouterr().err
        assert ("of 1 conversations 1 were truncated after a turn and 0 dropped" in said) == (
            n_kept < 3
        )


def test_conversation_of_which_no_turn_fits_is_dropped_and_counted(build, write, capsys):
    long = [{"role": "user", "content": "x" * 500}, {"role": "assistant", "content": "y"}]
    short = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    store = build(write({"messages": long}, {"messages": short}), length=100)
    assert [record.raw["messages"] for record in store] == [short]
    assert (store.manifest.n_cut, store.manifest.n_dropped) == (0, 1)
    assert store.manifest.n_lost == len(f"y{END}")
    assert (
        "of 2 conversations 0 were truncated after a turn and 1 dropped" in capsys.readouterr().err
    )
    with pytest.raises(UserError, match=r"no turn of any conversation fits into 101 tokens: set"):
        build(write({"messages": long}), length=100)


def test_statistics_mark_targets_and_count_lost_ones(build, write):
    row = {"messages": TALK[1:2] + TALK[4:]}
    whole = encode_messages(TEMPLATE, row["messages"], None)
    store = build(write(row, row), length=len(whole.ids) - 3)
    found = measure("train", store, BYTES, 1)
    (end, _), learned = whole.turns[:, 1], whole.turns[0, 1] - whole.turns[0, 0]
    n_lost = whole.turns[1, 1] - whole.turns[1, 0]
    assert found.sizes == {
        "tokens": 2 * end,
        "records": 2,
        "target tokens": 2 * learned,
        "records cut": 2,
        "records dropped": 0,
        "tokens lost": 2 * n_lost,
    }
    text, ids = found.samples[0].split(" | ids: ")
    assert text.startswith("messages: <|im_start|>user\nWeather?")
    assert f"<|im_start|>assistant\n⟦12 °C, Ünïcode 😀{END}⟧" in text
    marked = " ".join(map(str, whole.ids[slice(*whole.turns[0, :2])].tolist()))
    assert f"⟦{marked}⟧" in ids
    assert (store.select(np.arange(1)).n_targets("messages") == learned).all()


def test_zero_weight_messages_are_input_without_loss(build, write):
    talk = [dict(message) for message in TALK[-2:]]
    row = {"messages": [talk[0], {**talk[1], "weight": 0}, *talk]}
    (record,) = build(write(row))
    assert learned(record) == [f"No.{END}"]
    assert record.turns["messages"][0, 2] == 3
    np.testing.assert_array_equal(record.tokens["messages"], TEMPLATE.encode(talk * 2).ids)


def test_bad_rows_are_one_line_errors_or_skipped(build, write, capsys):
    good = {"prompt": "Hi", "completion": "Hello"}
    for row, problem in (
        ({"messages": []}, "no messages"),
        (
            {"talk": []},
            r"no messages, no conversations, no instruction and output, no prompt and",
        ),
        ({"messages": [{"role": "boss", "content": ""}]}, "unknown role 'boss'"),
        ({"messages": None}, "no conversation"),
    ):
        with pytest.raises(UserError, match=rf"a.jsonl:2: .*{problem}.*data.bad_rows=skip"):
            build(write(good, row))
        store = build(write(good, row), bad_rows="skip")
        assert (len(store), store.manifest.n_skipped) == (1, 1)
        assert "skipped 1 of 2 rows; first: " in capsys.readouterr().err


def test_table_without_a_conversation_is_an_error_even_where_rows_are_skipped(build, tmp_path):
    (tmp_path / "a.csv").write_text("q,a\nHi,Hello\n")
    with pytest.raises(UserError, match=r"no messages, .*available: q, a.*--config.data.columns"):
        build("csv:a.csv", bad_rows="skip")
    with pytest.raises(UserError, match="unknown name 'text'"):
        build("csv:a.csv", columns="text=q")
    with pytest.raises(UserError, match=r"columns=prompt=q: name messages, or conversations, or"):
        build("csv:a.csv", columns="prompt=q")
    with pytest.raises(UserError, match=r"no talk \(available: q, a\): set --config.data.columns"):
        build("csv:a.csv", columns="messages=talk", bad_rows="skip")


def test_store_depends_on_the_length_and_on_the_form_of_the_rows(build, write):
    spec = write({"prompt": "Hi", "completion": "Hello"})
    assert build(spec).directory != build(spec, length=200).directory
    assert build(spec).directory == build(spec).directory
