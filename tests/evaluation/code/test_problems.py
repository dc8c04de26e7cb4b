import gzip
import json

import pytest

from lm.errors import UserError
from lm.evaluation.code.completions import code_of
from lm.evaluation.code.problems import read_completions, read_problems

HUMAN_EVAL = {
    "task_id": "Test/0",
    "prompt": 'def add(x):\n    """Add one."""\n',
    "entry_point": "add",
    "canonical_solution": "    return x + 1\n",
    "test": "def check(candidate):\n    assert candidate(1) == 2\n",
}
MBPP = {
    "task_id": 7,
    "prompt": "Write a function to add one.",
    "code": "def sum(x):\n    return x + 1\n",
    "test_imports": ["import math"],
    "test_list": ["assert sum(1) == math.floor(2.5)"],
}


def write_rows(file, *rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    return file


def test_both_kinds_of_problems_are_read(tmp_path):
    file = write_rows(tmp_path / "mixed.jsonl.gz", HUMAN_EVAL, MBPP)
    human_eval, mbpp = read_problems(file)
    assert human_eval.prompt == HUMAN_EVAL["prompt"]
    assert human_eval.program("    return 3") == HUMAN_EVAL["prompt"] + "    return 3"
    assert human_eval.tests["statements"] == [HUMAN_EVAL["test"], "check(add)"]
    assert human_eval.tests["tested"] == ["add"]
    assert mbpp.task_id == "7"
    assert mbpp.prompt == (
        '"""\nWrite a function to add one.\nassert sum(1) == math.floor(2.5)\n"""\n'
    )
    assert mbpp.program(mbpp.reference) == MBPP["code"]
    assert mbpp.tests["tested"] == ["sum"]  # not Python's
    assert HUMAN_EVAL["prompt"].rstrip() in human_eval.request
    assert MBPP["test_list"][0] in mbpp.request


def test_json_array_is_read_as_lines_are(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([MBPP]))
    assert read_problems(tmp_path / "a.json") == read_problems(
        write_rows(tmp_path / "b.jsonl", MBPP)
    )


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", "", "no problem"),
        ("a.jsonl", "{", "damaged|JSON"),
        ("a.json", "{}", "an object instead of a list"),
        ("a.json", "[1]", "entry 1 is not an object"),
        ("a.jsonl", '{"task_id": "x"}', "neither a HumanEval problem .* nor an MBPP problem"),
        ("a.jsonl", json.dumps(HUMAN_EVAL | {"prompt": 3}), "field 'prompt' is not text"),
        ("a.jsonl", json.dumps(HUMAN_EVAL | {"test": "pass"}), "a function check"),
        ("a.jsonl", json.dumps(HUMAN_EVAL | {"test": "def check(f:"}), "a function check"),
        ("a.jsonl", json.dumps(MBPP | {"test_list": ["assert f("]}), "is not Python"),
        ("a.jsonl", json.dumps(MBPP | {"test_list": []}), "'test_list' is empty"),
        ("a.jsonl", json.dumps(MBPP | {"test_list": [3]}), "'test_list' is not a list of texts"),
        ("a.jsonl", (json.dumps(MBPP) + "\n") * 2, "the problem 7 occurs twice"),
        ("a.jsonl.gz", "plain", "a.jsonl.gz"),
    ],
)
def test_bad_file_is_a_one_line_error(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        read_problems(tmp_path / name)


def test_missing_file_is_a_one_line_error(tmp_path):
    with pytest.raises(UserError, match="no file"):
        read_problems(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"task_id": "other", "completion": ""}, "no problem 'other'"),
        ({"task_id": "7"}, "field 'completion' is not text"),
        ({}, "no problem ''"),
    ],
)
def test_bad_completion_is_a_one_line_error(tmp_path, row, said):
    problems = read_problems(write_rows(tmp_path / "a.jsonl", MBPP))
    with pytest.raises(UserError, match=said):
        read_completions(write_rows(tmp_path / "b.jsonl", row), problems)


def test_no_completion_is_a_one_line_error(tmp_path):
    problems = read_problems(write_rows(tmp_path / "a.jsonl", MBPP))
    with pytest.raises(UserError, match="no completion"):
        read_completions(write_rows(tmp_path / "b.jsonl"), problems)


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        ("Here:\n```python\nx = 1\n```\nAnd:\n```\ny\n```", "x = 1\n"),
        ("```\nx = 1\n", "x = 1\n"),  # cut
        ("x = 1", "x = 1"),
        ("  ```py\nx = '```'\n  ```", "x = '```'\n"),
    ],
)
def test_code_is_taken_out_of_a_reply(reply, code):
    assert code_of(reply) == code
