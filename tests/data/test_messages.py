"""Rows of files become messages, or are bad with a one-sentence reason."""

from __future__ import annotations

import datetime
import json

import pytest

from lm.data.chat.messages import all_text, as_messages, content_text, conversation_of, messages_of
from lm.data.records import BadRow

HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CALL = {"name": "weather", "arguments": {"city": "Bern"}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def said(values):
    return [(m["role"], content_text(m["content"])) for m in conversation_of(values).messages]


@pytest.mark.parametrize(
    "values",
    [
        {"messages": HELLO},
        {"messages": json.dumps(HELLO)},
        {"messages": [{**message, "name": None} for message in HELLO], "tools": None},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, HELLO[1]]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"conversations": HELLO},
        {"instruction": "Hi", "input": "", "output": "Hello"},
        {"instruction": "Hi", "output": "Hello", "input": None, "history": []},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": HELLO[:1], "completion": HELLO[1:]},
        {"prompt": "Hi", "completion": HELLO[1:], "messages": None},
    ],
)
def test_every_form_of_a_row_gives_the_same_conversation(values):
    assert said(values) == [("user", "Hi"), ("assistant", "Hello")]


def test_system_input_and_history_are_reported_in_their_order():
    row = {"instruction": "Add", "input": "1, 2", "output": "3", "system": "Be brief."}
    row["history"] = [["Hi", "Hello"]]
    assert said(row) == [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Add\n\n1, 2"),
        ("assistant", "3"),
    ]


def test_messages_keep_a_system_message_of_their_own():
    own = [{"role": "system", "content": "Own."}, *HELLO]
    assert said({"messages": own, "system": "Other."})[0] == ("system", "Own.")
    assert len(said({"messages": own, "system": "Other."})) == len(own)


def test_tools_and_their_calls():
    turns = [
        {"from": "system", "value": "You may look."},
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "12 °C"},
        {"from": "gpt", "value": "12 °C."},
    ]
    found = conversation_of({"conversations": turns, "tools": json.dumps([TOOL])})
    roles = [message["role"] for message in found.messages]
    assert roles == ["system", "user", "assistant", "tool", "assistant"]
    assert found.messages[2]["tool_calls"] == [{"type": "function", "function": CALL}]
    assert found.tools == [TOOL]
    assert '"city": "Bern"' in all_text(*found)
    openai = {"role": "assistant", "content": None, "tool_calls": [{"function": CALL}]}
    (message,) = conversation_of({"messages": [openai]}).messages
    assert message["content"] is None
    assert message["tool_calls"] == [{"function": CALL}]


def test_assistant_of_a_prompt_is_without_loss():
    row = {"prompt": [*HELLO, HELLO[0]], "completion": "Hello again"}
    weights = [message.get("weight") for message in conversation_of(row).messages]
    assert weights == [None, 0, None, None]


def test_non_json_values_become_text():
    (message,) = messages_of([{**HELLO[0], "at": datetime.date(2024, 1, 2), "n": None}])
    assert message == {**HELLO[0], "at": "2024-01-02"}


BAD = {
    "nothing": ({}, "no conversation"),
    "no messages": ({"messages": []}, "no messages"),
    "no list": ({"messages": 3}, "type int, not a list"),
    "JSON": ({"messages": "[{"}, "not valid JSON"),
    "no mapping": ({"messages": ["Hi"]}, "message 1 is of type str"),
    "no role": ({"messages": [{"content": "Hi"}]}, "message 1: unknown role None"),
    "role": ({"messages": [{"role": "boss", "content": "Hi"}]}, "unknown role 'boss' "),
    "listed role": ({"messages": [{"role": ["user"], "content": "Hi"}]}, "unknown role"),
    "no content": ({"messages": [*HELLO, {"role": "user"}]}, "message 3: no content"),
    "number": ({"messages": [{"role": "user", "content": 3}]}, "type int, not text"),
    "part": ({"messages": [{"role": "user", "content": [3]}]}, "type int, not text"),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'image' is not"),
    "surrogate": (
        {"messages": [{"role": "user", "content": "\ud83d"}]},
        "message 1 is not valid UTF-8",
    ),
    "weight": ({"messages": [{**HELLO[1], "weight": 2}]}, "weight 2 is neither 0 nor 1"),
    "user alone": ({"messages": HELLO[:1]}, "no assistant message to train on"),
    "silent": ({"messages": [HELLO[0], {**HELLO[1], "content": " "}]}, "to train on"),
    "weighed out": ({"messages": [HELLO[0], {**HELLO[1], "weight": 0}]}, "to train on"),
    "empty output": ({"instruction": "Hi", "output": ""}, "to train on"),
    "instruction": ({"instruction": 1, "output": "a"}, "'instruction' is of type int"),
    "prompt": ({"prompt": {"a": 1}, "completion": "a"}, "'prompt' is of type dict"),
    "history": ({"instruction": "", "output": "a", "history": ["a"]}, "pairs of strings"),
    "call": (
        {"conversations": [{"from": "function_call", "value": "{}"}]},
        "not a JSON object with",
    ),
    "call text": ({"conversations": [{"from": "function_call", "value": "a"}]}, "not valid JSON"),
    "tools": ({"messages": HELLO, "tools": 3}, "tools are of type int"),
    "system": ({"messages": HELLO, "system": 3}, "'system' is of type int"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_row_is_one_sentence(name):
    values, sentence = BAD[name]
    with pytest.raises(BadRow) as caught:
        conversation_of(values)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_column_determines_the_role_of_a_text():
    assert as_messages("chosen", "Yes", "assistant") == [{"role": "assistant", "content": "Yes"}]
    assert as_messages("chosen", HELLO, "assistant") == HELLO
