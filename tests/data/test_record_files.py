import gzip
import json
from types import SimpleNamespace

import pytest

from lm.config.registries import SOURCES
from lm.errors import UserError


def rows(tmp_path, kind, *contents, header=True):
    """The rows of files "a", "b", … with FILE cut off to its name."""
    paths = []
    for name, content in zip("ab", contents, strict=False):
        paths.append(tmp_path / name)
        paths[-1].write_bytes(content if isinstance(content, bytes) else content.encode())
    data = SimpleNamespace(directory="", header=header, bad_rows="error", field="text")
    found = SOURCES[kind]("|".join(map(str, paths)), data, "train").rows()
    return [(row.where.removeprefix(f"{tmp_path}/"), row.problem or row.values) for row in found]


def test_tsv_has_no_quoting(tmp_path):
    content = '\ufeffsentence\tlabel\r\n"a \t1\r\n\nb"\' ,\t0'
    assert rows(tmp_path, "tsv", content) == [
        ("a:2", {"sentence": '"a ', "label": "1"}),
        ("a:4", {"sentence": "b\"' ,", "label": "0"}),
    ]


def test_csv_is_quoted_and_counts_lines_of_the_file(tmp_path):
    content = 'x,y\n"a\nb","c""d"\n\ne,"f,g"\n'
    assert rows(tmp_path, "csv", content) == [
        ("a:2", {"x": "a\nb", "y": 'c"d'}),
        ("a:5", {"x": "e", "y": "f,g"}),
    ]


@pytest.mark.parametrize(("kind", "mark"), [("tsv", "\t"), ("csv", ",")])
def test_without_a_header_columns_have_numbers(tmp_path, kind, mark):
    content = f"a{mark}b\nc\nd{mark}e{mark}f\ng{mark}h"
    assert rows(tmp_path, kind, content, header=False) == [
        ("a:1", {"0": "a", "1": "b"}),
        ("a:2", "1 columns instead of 2"),
        ("a:3", "3 columns instead of 2"),
        ("a:4", {"0": "g", "1": "h"}),
    ]


def test_quote_left_open_does_not_swallow_the_file_unseen(tmp_path):
    first, last = rows(tmp_path, "csv", 'x,y\na,b\n"c,d\ne,f\n')
    assert first == ("a:2", {"x": "a", "y": "b"})
    assert last[0] == "a:3"
    assert "not valid CSV" in last[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "a:1: no header line"), ("x\ty\tx\n", "a:1: two columns have the same name")],
)
def test_wrong_header_is_reported(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        rows(tmp_path, "tsv", content)


def test_jsonl_rows_are_objects(tmp_path):
    content = '{"a": "x\\ny", "b": 1}\n\n{"a"\n[1]\n' + "[" * 100_000 + "\n"
    good, broken, other, deep = rows(tmp_path, "jsonl", content)
    assert good == ("a:1", {"a": "x\ny", "b": 1})
    assert broken[0] == "a:3"
    assert broken[1].startswith("not valid JSON")
    assert other == ("a:4", "not a JSON object but list")
    assert deep[1].startswith("not valid JSON")


def test_parallel_lines_are_paired(tmp_path):
    with pytest.raises(UserError, match="compressed"):
        rows(tmp_path, "parallel", "one\r\ntwo\n", gzip.compress(b"x"))
    assert rows(tmp_path, "parallel", "one\r\n\ntwo\n", "eins\n\nzwei\u2028drei") == [
        ("a:1", {"source": "one", "target": "eins"}),
        ("a:2", {"source": "", "target": ""}),
        ("a:3", {"source": "two", "target": "zwei\u2028drei"}),
    ]


@pytest.mark.parametrize(
    ("first", "second", "longer"), [("1\n2\n3", "1\n", "a"), ("1", "1\n2\n3", "b")]
)
def test_lines_without_a_partner_are_bad(tmp_path, first, second, longer):
    found = rows(tmp_path, "parallel", first, second)
    assert found[0] == ("a:1", {"source": "1", "target": "1"})
    assert [where for where, _ in found[1:]] == [f"{longer}:2", f"{longer}:3"]
    shorter = "b" if longer == "a" else "a"
    assert all(problem == f"{tmp_path}/{shorter} has no line for it" for _, problem in found[1:])


def squad(*questions):
    return json.dumps({"data": [{"paragraphs": [{"context": "A b.", "qas": list(questions)}]}]})


def test_squad_questions_have_their_context(tmp_path):
    old = {"id": "1", "question": "?", "answers": [{"text": "b", "answer_start": 2}]}
    new = {"id": "2", "question": "!", "answers": [], "is_impossible": True}
    broken = {"id": "3", "question": "."}
    assert rows(tmp_path, "squad", squad(old, new, broken)) == [
        (
            "a: question 1",
            {
                "id": "1",
                "question": "?",
                "context": "A b.",
                "answers": [{"text": "b", "start": 2}],
                "is_impossible": False,
            },
        ),
        (
            "a: question 2",
            {"id": "2", "question": "!", "context": "A b.", "answers": [], "is_impossible": True},
        ),
        ("a: question 3", "not in the format of SQuAD (KeyError: 'answers')"),
    ]


@pytest.mark.parametrize("content", ["{", "[]", '{"data": [{}]}', '{"data": 3}', b"\xff"])
def test_other_json_is_not_squad(tmp_path, content):
    with pytest.raises(UserError, match="/a: not in the format of SQuAD"):
        rows(tmp_path, "squad", content)


def test_only_the_row_with_broken_bytes_is_bad(tmp_path):
    found = rows(tmp_path, "tsv", b"x\n\xff\n\xc3\xa9\n")
    assert found == [("a:2", {"x": "\udcff"}), ("a:3", {"x": "\u00e9"})]
