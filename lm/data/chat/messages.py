"""Messages of a conversation, parsed from rows in common formats.

A message is a mapping with "role" and "content", as chat templates expect: content is a text, a
list of text parts, or None next to "tool_calls". Its "weight" (0 or 1, as in OpenAI's files) says
whether an assistant message is a target. Formats of rows:

    messages                     "messages": [{"role", "content"}, …]; Hugging Face, OpenAI
    ShareGPT                     "conversations": [{"from", "value"}, …]
    Alpaca                       "instruction", "input", "output", "history"
    prompt and completion        texts, or lists of messages; only the completion is a target

All may have "system" (a text, used if messages do not start with a system message) and "tools" (a
list of JSON schemas). Invalid rows raise BadRow.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from lm.data.records import BadRow
from lm.errors import UserError
from lm.storage import parse_json

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# Role names in ShareGPT files and derived formats.
_SAME_ROLE = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
_FUNCTION_CALL = "function_call"  # role of an assistant message whose value is a call, in JSON


class Conversation(NamedTuple):
    """Conversation of a row.

    Attributes:
        messages: its messages.
        tools: JSON schemas of available tools; None: none.
    """

    messages: list[Message]
    tools: list[Any] | None


def conversation_of(values: Mapping[str, Any]) -> Conversation:
    """Parse the conversation of a row, in the first format whose columns it has.

    Args:
        values: values by column; None counts as missing.

    Raises:
        BadRow: the row has no conversation or no targets, or is malformed.
    """
    values = {name: value for name, value in values.items() if value is not None}
    for columns, read in FORMS.items():
        if all(column in values for column in columns):
            messages = read(values)
            break
    else:
        raise BadRow(f"no conversation: neither {' nor '.join(map(' and '.join, FORMS))}")
    has_own = bool(messages) and messages[0]["role"] in ("system", "developer")
    if values.get("system") and not has_own:
        messages = [text_message("system", values["system"]), *messages]
    if not messages:
        raise BadRow("no messages")
    if not any(is_target_message(message) and says_something(message) for message in messages):
        raise BadRow("no assistant message to train on")
    return Conversation(messages, tools_of(values))


def is_target_message(message: Message) -> bool:
    """Return whether a message is a training target."""
    return message["role"] == "assistant" and message.get("weight") != 0


def says_something(message: Message) -> bool:
    """Return whether a message has non-blank text or calls a tool."""
    return bool(content_text(message["content"]).strip() or message.get("tool_calls"))


def from_messages(values: Mapping[str, Any]) -> list[Message]:
    """Parse column "messages"."""
    return messages_of(values["messages"])


def from_sharegpt(values: Mapping[str, Any]) -> list[Message]:
    """Parse column "conversations"."""
    return messages_of(values["conversations"])


def from_alpaca(values: Mapping[str, Any]) -> list[Message]:
    """Build messages from an instruction, its input if any, and the output.

    Earlier turns are in "history", a list of text pairs.
    """
    messages = []
    for turn in values.get("history") or ():
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise BadRow("'history' must contain only pairs of strings")
        messages += [text_message("user", turn[0]), text_message("assistant", turn[1])]
    parts = [_text("instruction", values["instruction"]), _text("input", values.get("input", ""))]
    question = "\n\n".join(part for part in parts if part.strip())
    reply = text_message("assistant", values["output"], "output")
    return [*messages, text_message("user", question), reply]


def from_prompt(values: Mapping[str, Any]) -> list[Message]:
    """Build messages from a prompt (no targets) and its completion."""
    prompt = as_messages("prompt", values["prompt"], "user")
    completion = as_messages("completion", values["completion"], "assistant")
    return [*map(without_loss, prompt), *completion]


FORMS: dict[tuple[str, ...], Callable[[Mapping[str, Any]], list[Message]]] = {
    ("messages",): from_messages,
    ("conversations",): from_sharegpt,
    ("instruction", "output"): from_alpaca,
    ("prompt", "completion"): from_prompt,
}
COLUMNS = (
    *("messages", "conversations", "instruction", "input", "output", "history"),
    *("prompt", "completion", "system", "tools"),
)


def as_messages(column: str, value: Any, role: str) -> list[Message]:
    """Parse a column that holds messages, or a text said by `role`."""
    if isinstance(value, list | tuple):
        return messages_of(value)
    return [text_message(role, value, column)]


def messages_of(value: Any) -> list[Message]:
    """Parse a list of mappings, or its JSON text, to messages.

    Mappings have "role" and "content", or "from" and "value"; null values are dropped.
    """
    if isinstance(value, str):
        value = _parsed("messages", value)
    if not isinstance(value, list | tuple):
        raise BadRow(f"messages are of type {type(value).__name__}, not a list")
    return [_message(number, entry) for number, entry in enumerate(value, start=1)]


def text_message(role: str, text: Any, column: str = "") -> Message:
    """Build a message from a text; BadRow if it is not text."""
    return {"role": role, "content": _text(column or role, text)}


def without_loss(message: Message) -> Message:
    """Mark a message as not a target."""
    return {**message, "weight": 0} if message["role"] == "assistant" else message


def tools_of(values: Mapping[str, Any]) -> list[Any] | None:
    """Parse the tools of a row: a list of JSON schemas or its JSON text; None if there are none."""
    tools = values.get("tools") or None
    if isinstance(tools, str):
        tools = _parsed("tools", tools)
    if not isinstance(tools, list | None):
        raise BadRow(f"tools are of type {type(tools).__name__}, not a list")
    return _as_json("tools", tools) or None


def _message(number: int, entry: Any) -> Message:
    """Normalize a message, with its role as in chat templates."""
    where = f"message {number}"
    if not isinstance(entry, Mapping):
        raise BadRow(f"{where} is of type {type(entry).__name__}, not a mapping")
    message = {name: _as_json(where, value) for name, value in entry.items() if value is not None}
    if "role" not in message and "from" in message:
        message = {"role": message.pop("from"), "content": message.pop("value", None), **message}
    role = message.get("role")
    if role == _FUNCTION_CALL:
        return {"role": "assistant", "content": "", "tool_calls": _calls(where, message)}
    role = _SAME_ROLE.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise BadRow(f"{where}: unknown role {role!r} (known: {', '.join((*ROLES, *_SAME_ROLE))})")
    content: Any = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise BadRow(f"{where}: no content")
    _check_content(where, content)
    if message.get("weight", 1) not in (0, 1):
        raise BadRow(f"{where}: weight {message['weight']!r} is neither 0 nor 1")
    return {**message, "role": role, "content": content}


def _check_content(where: str, content: Any) -> None:
    for part in content if isinstance(content, list) else [content]:
        text = part
        if isinstance(part, Mapping):
            if part.get("type", "text") != "text":
                raise BadRow(f"{where}: content of type {part.get('type')!r} is not text")
            text = part.get("text")
        if not isinstance(text, str) and (text is not None or isinstance(content, list)):
            raise BadRow(f"{where}: content is of type {type(text).__name__}, not text")


def _calls(where: str, message: Message) -> list[dict[str, Any]]:
    """Convert ShareGPT's function_call to the tool calls that Hugging Face templates expect."""
    found: Any = message.get("content")
    found = _parsed(f"{where}: {_FUNCTION_CALL}", found) if isinstance(found, str) else found
    calls: list[Any] = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, Mapping) and "name" in call for call in calls):
        raise BadRow(f"{where}: {_FUNCTION_CALL} is not a JSON object with a name and arguments")
    return [
        {
            "type": "function",
            "function": {"name": call["name"], "arguments": call.get("arguments", {})},
        }
        for call in calls
    ]


def _text(column: str, value: Any) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{column!r} is of type {type(value).__name__}, not a string")
    return _as_json(repr(column), value)


def _as_json(where: str, value: Any) -> Any:
    """Convert a value to JSON types, other types to text; BadRow if it is not valid UTF-8."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{where} is not valid UTF-8: it contains a lone surrogate") from error
    return json.loads(text)


def _parsed(where: str, text: str) -> Any:
    try:
        return parse_json(text, where, object)
    except UserError as error:
        raise BadRow(f"{where}: not valid JSON") from error


def content_text(content: Any) -> str:
    """Return the text of a message's content; text parts are concatenated."""
    if isinstance(content, list):
        return "".join(part if isinstance(part, str) else part["text"] for part in content)
    return content or ""


def all_text(messages: Iterable[Message], tools: list[Any] | None) -> str:
    """Return roles and texts of a conversation, to fit a tokenizer on."""
    lines = []
    for message in messages:
        lines += [message["role"], content_text(message["content"])]
        lines += [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls") or ()]
    return "\n".join([*lines, *(json.dumps(tool, ensure_ascii=False) for tool in tools or ()), ""])
