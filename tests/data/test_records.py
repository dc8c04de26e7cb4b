import json
from contextlib import nullcontext

import pytest

from lm.data.records import RecordTexts, open_records
from lm.data.tokenizer import make_tokenizer
from lm.errors import UserError

ROWS = "sentence\tlabel\tid\ngood film \t1\t7\nbad\t 0 \t8\n"


@pytest.fixture
def write(tmp_path):
    def write(content, name="a"):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def read(data, spec):
    return [record for record, _ in open_records(spec, data)]


def test_columns_are_renamed(make_data, write, tmp_path):
    write(ROWS)
    records = open_records("tsv:a", make_data(columns="text=sentence, label = label", labels="0,1"))
    assert list(records) == [
        ({"text": "good film ", "label": "1"}, f"{tmp_path}/a:2"),
        ({"text": "bad", "label": "0"}, f"{tmp_path}/a:3"),
    ]
    assert list(records) == list(records)


def test_columns_of_the_right_name_need_no_setting(make_data, write):
    write(ROWS.replace("sentence", "text"))
    assert read(make_data(labels="0,1"), "tsv:a")[1] == {"text": "bad", "label": "0", "id": "8"}
    write("where is c0\t( loc:t c0 )\n")
    data = make_data(columns="source=0,target=1", header=False)
    assert read(data, "tsv:a") == [{"source": "where is c0", "target": "( loc:t c0 )"}]


def test_json_labels_may_be_numbers(make_data, write):
    write('{"text": "x", "label": 2.5, "id": 3}\n{"text": "y", "label": true, "id": "4"}')
    assert read(make_data(labels="2.5,true"), "jsonl:a") == [
        {"text": "x", "label": "2.5", "id": "3"},
        {"text": "y", "label": "true", "id": "4"},
    ]


def test_a_glob_names_files_in_order(make_data, write, tmp_path):
    for number in (2, 1):
        write(f"e{number}\n", f"{number}.en")
        write(f"d{number}\n", f"{number}.de")
    found = read(make_data(), "parallel:*.en|*.de")
    assert [(record["source"], record["target"]) for record in found] == [
        ("e1", "d1"),
        ("e2", "d2"),
    ]
    write("e3", "3.en")
    with pytest.raises(UserError, match="3 source files but 2 target files"):
        read(make_data(), "parallel:*.en|*.de")


def squad(context="A b.", **changes):
    question = {
        "id": "1",
        "question": "?",
        "answers": [{"text": "b", "answer_start": 2}],
        **changes,
    }
    return json.dumps({"data": [{"paragraphs": [{"context": context, "qas": [question]}]}]})


@pytest.mark.parametrize(
    ("spec", "content", "problem", "n_good"),
    [
        ("tsv:a", "text\tlabel\nx\n", "/a:2: 1 columns instead of 2", 0),
        (
            "tsv:a",
            "text\tlabel\nx\t2\n",
            "/a:2: label '2' is not one of --config.data.labels=0, 1",
            0,
        ),
        ("tsv:a", "text\tlabel\n \t1\n", "/a:2: 'text' is empty", 0),
        ("tsv:a", b"text\tlabel\nab\xff\t1\n", "/a:2: 'text' is not UTF-8 at character 2", 0),
        ("csv:a", 'text,label\n"x,1\n', "/a:2: not valid CSV", 0),
        ("jsonl:a", "{\n", "/a:1: not valid JSON", 0),
        ("jsonl:a", '{"text": "x", "label": 1}\n{"text": 3}', "/a:2: 'text' is of type int", 1),
        ("jsonl:a", '{"text": "\\ud83d", "label": 1}', "/a:1: 'text' is not UTF-8", 0),
        ("jsonl:a", '{"text": "", "label": 1}', "/a:1: 'text' is empty", 0),
        ("jsonl:a", '{"text": "x"}\n{"label": 1}', "/a:2: no column 'text' (available: label)", 1),
        ("jsonl:a", '{"text": "x", "label": [1]}', "/a:1: 'label' is of type list", 0),
        ("parallel:a|b", "one\ntwo", "/a:2: /", 1),
        ("squad:a", squad(answers=[]), "question 1: no answers", 0),
        (
            "squad:a",
            squad("A bb", answers=[{"text": "b.", "answer_start": 2}]),
            "'b.' is not at",
            0,
        ),
        ("squad:a", squad(question=" "), "question 1: 'question' is empty", 0),
        ("squad:a", squad(answers=[{"text": "b", "answer_start": "2"}]), "not a text with its", 0),
    ],
)
def test_a_bad_row_is_an_error_or_skipped_and_reported(
    make_data, write, spec, content, problem, n_good
):
    write(content)
    write("eins", "b")
    with pytest.raises(UserError) as error:
        read(make_data(labels="0,1"), spec)
    assert problem in str(error.value)
    assert "bad_rows=skip" in str(error.value)
    reported = []
    records = open_records(spec, make_data(labels="0,1", bad_rows="skip")).read(reported.append)
    with pytest.raises(UserError, match="has no usable record") if not n_good else nullcontext():
        assert len(list(records)) == n_good
    assert len(reported) == 1
    assert problem in reported[0]


def test_a_label_is_a_list_of_labels(make_data, write):
    lines = ('{"text": "x", "label": ["b", "a,c"]}', '{"text": "y", "label": []}')
    write("\n".join((*lines, '{"text": "z", "label": " b"}', '{"text": "z", "label": [null]}')))
    records = iter(open_records("jsonl:a", make_data(labels=r"b,a\,c", multi_label=True)))
    assert [next(records)[0]["label"] for _ in range(3)] == [r"b,a\,c", "", "b"]
    with pytest.raises(UserError, match="a:4: 'label' is of type NoneType"):
        next(records)


@pytest.mark.parametrize("label", ["x", "nan", "inf", "1,5"])
def test_without_names_a_label_is_a_number(make_data, write, label):
    write(f"text\tlabel\nx\t-2.5e-1\ny\t{label}\n")
    records = iter(open_records("tsv:a", make_data()))
    assert next(records)[0]["label"] == "-2.5e-1"
    with pytest.raises(UserError, match=r"a:3: label .* is not a number"):
        next(records)


@pytest.mark.parametrize(
    ("spec", "columns", "words"),
    [
        ("xml:a", "", ["'xml:a'", "parallel:SOURCE_PATH|TARGET_PATH"]),
        ("parallel:a", "", ["two paths"]),
        ("tsv:none", "", ["none", "LM_DATA_DIR"]),
        (
            "tsv:a",
            "text=sentences",
            ["a:2: no column 'sentences' (available: sentence, label, id)"],
        ),
        ("tsv:a", "text=0", ["no column '0'"]),
        (
            "tsv:a",
            "sentence=text",
            ["unknown name 'sentence'", "question, context, words, tags, label, id"],
        ),
        ("tsv:a", "text", ["NAME=COLUMN"]),
        ("tsv:a", "text=label,text=sentence", ["each name once"]),
    ],
)
@pytest.mark.parametrize("policy", ["error", "skip"])
def test_what_is_wrong_with_a_source_is_said(make_data, write, spec, columns, words, policy):
    write(ROWS)
    with pytest.raises(UserError) as error:
        read(make_data(columns=columns, bad_rows=policy), spec)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_unnamed_columns_are_shown(make_data, write):
    write("sentence\tgold\nx\t1\n")
    with pytest.raises(UserError, match=r"\(available: sentence, gold\).*text=sentence"):
        read(make_data(), "tsv:a")


def test_the_digest_is_that_of_files_and_settings(make_data, write):
    write(ROWS)

    def digest(spec="tsv:a", **changes):
        return open_records(spec, make_data(**changes)).digest

    write(ROWS, "b")
    variants = [
        digest(),
        digest(columns="text=sentence"),
        digest(labels="0,1"),
        digest(bad_rows="skip"),
        digest(header=False),
        digest("csv:a"),
        digest("parallel:a|b"),
        digest("parallel:b|a"),
    ]
    assert len(set(variants)) == len(variants)
    assert digest() == variants[0]
    write(ROWS + "new\t1\t9\n")
    assert digest() != variants[0]


def test_a_tokenizer_is_fitted_on_all_texts(make_data, write):
    write("ab ab\nba\n", "en")
    write("äb\nö\n", "de")
    data = make_data(tokenizer="words")
    corpus = RecordTexts(open_records("parallel:en|de", data))
    assert [chunk.text for chunk in corpus.chunks()] == ["ab ab", "äb", "ba", "ö"]
    assert all(chunk.first and chunk.last for chunk in corpus.chunks())
    assert make_tokenizer(data, [corpus]).words[2:] == ("ab", "ba", "äb", "ö")
    assert make_tokenizer(make_data(tokenizer="char"), [corpus]).alphabet == " abäö"
