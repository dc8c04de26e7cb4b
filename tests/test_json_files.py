"""The JSON reader returns the value, or an error that names the file; no other exceptions."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.errors import UserError
from lm.storage import parse_json, read_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES, st.sampled_from((dict, list, str)))
def test_value_of_the_wanted_type_or_an_error(value, kind):
    for text in (
        json.dumps(value),
        json.dumps(value).encode(),
        json.dumps(value).encode("utf-8-sig"),
    ):
        if isinstance(value, kind):
            assert parse_json(text, "x.json", kind) == value
        else:
            with pytest.raises(UserError, match=r"^x\.json: damaged JSON \(.* instead of"):
                parse_json(text, "x.json", kind)


def outcome(content: bytes) -> dict | str:
    """Return the object, or the message of the error."""
    try:
        return parse_json(content, "x.json")
    except UserError as error:
        return str(error)


def is_object_or_line(found: dict | str) -> bool:
    return isinstance(found, dict) or (found.startswith("x.json: damaged") and "\n" not in found)


@given(st.binary(max_size=40))
def test_bytes_are_an_object_or_an_error(content):
    assert is_object_or_line(outcome(content))


@given(VALUES.map(lambda value: json.dumps({"a": value}).encode()), st.data())
def test_damage_is_an_object_or_an_error(content, data):
    start = data.draw(st.integers(0, len(content) - 1))
    damage = data.draw(st.sampled_from([b"", b"\0" * 8, b"\xff", b"[" * 9, b"9" * 5000]))
    assert is_object_or_line(outcome(content[:start] + damage))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"\0" * 100, "Expecting value"),
        (b'{"a": 1', "Expecting ',' delimiter"),
        (b"[" * 10**6, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b'{"a": "\xe9"}', "not UTF-8 at byte 7"),
        (b"[1]", "a list instead of an object"),
    ],
)
def test_damaged_files(tmp_path, content, problem):
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_json(file)
    assert str(error.value).startswith(f"{file}: damaged JSON ({problem}")
    assert len(str(error.value)) < len(str(file)) + 120


def test_half_of_a_surrogate_pair_is_rejected_where_characters_are_whole():
    assert parse_json(r'{"a": "\ud83d"}', "x.json") == {"a": "\ud83d"}
    assert parse_json(r'{"a": "\ud83d\ude42"}', "x.json", whole_characters=True) == {"a": "🙂"}
    with pytest.raises(UserError, match="half of a surrogate pair"):
        parse_json(r'{"a": ["\ud83d"]}', "x.json", whole_characters=True)


def test_missing_file_is_left_to_the_caller(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "file" / "none.json")
