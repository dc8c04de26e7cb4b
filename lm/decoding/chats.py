"""Inputs that are texts or conversations: their token ids, and what ends an output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm.data.chat.messages import Message, as_messages, messages_of, tools_of
from lm.data.records import BadRow
from lm.data.tokenizer import Tokenizer
from lm.decoding.controls import Controls
from lm.errors import UserError

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from lm.data.chat.chat_template import ChatTemplate


@dataclass(frozen=True)
class Chat:
    """Conversation that is to be answered.

    Attributes:
        messages: its messages; if an assistant said the last one, the answer continues it.
        tools: JSON schemas of the tools that may be called; None: none.
    """

    messages: Sequence[Message]
    tools: Sequence[Any] | None = None

    def record(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        tools = {"tools": list(self.tools)} if self.tools else {}
        return {"messages": list(self.messages)} | tools


def chat_of(values: Mapping[str, Any], system: str | None = None) -> Chat:
    """Return the conversation of a row: "messages", ShareGPT's "conversations", or a "prompt".

    Args:
        values: values by column.
        system: system prompt of a conversation that has none.

    Raises:
        BadRow: there is none, or it is not well formed.
    """
    values = {name: value for name, value in values.items() if value is not None}
    column = next((x for x in ("messages", "conversations", "prompt") if x in values), None)
    if column is None:
        raise BadRow("no field 'messages', 'conversations' or 'prompt'")
    found = values[column]
    messages = as_messages(column, found, "user") if column == "prompt" else messages_of(found)
    if not messages:
        raise BadRow("no messages")
    first = messages[0]["role"]
    before = system if first not in ("system", "developer") else None
    start = [] if before is None else [{"role": "system", "content": before}]
    return Chat([*start, *messages], tools_of(values))


def chat_ids(template: ChatTemplate, chat: Chat) -> list[int]:
    """Return the token ids of a conversation, up to where its answer goes on.

    Raises:
        UserError: the template does not take it.
    """
    continues = chat.messages[-1]["role"] == "assistant"
    encoded = template.encode(
        chat.messages,
        chat.tools,
        add_generation_prompt=not continues,
        continue_final_message=continues,
    )
    return encoded.ids.tolist()


def chat_controls(config: ConfigDict, tokenizer: Tokenizer, template: ChatTemplate) -> Controls:
    """Return the controls of a resolved configuration, with the ends of an assistant's turn."""
    return Controls.from_config(config, tokenizer, template.stop_ids)


def bad_row(where: object, error: BadRow) -> UserError:
    """Return the error of a row that is no conversation."""
    return UserError(f"{where}: {error}")
