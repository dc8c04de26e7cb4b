"""Conversation records: rendered by the chat template, truncated at whole turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from lm.data.chat.chat_template import ChatTemplate
from lm.data.chat.messages import (
    COLUMNS,
    FORMS,
    Message,
    all_text,
    content_text,
    conversation_of,
    is_target_message,
)
from lm.data.record_store import EncodedRecord
from lm.data.records import BadRow, Fields, Records
from lm.data.row_documents import MISSING, field_value
from lm.data.sources import RecordSource, Row
from lm.data.tokenizer import Tokenizer
from lm.errors import UserError

_SPANS = 2  # version of the target spans: stores with another version are rebuilt


@dataclass(frozen=True)
class Conversations(Records):
    """Conversations of one source: "messages", and "tools" if present.

    Attributes:
        length: inputs per example; a conversation has up to one token more.
    """

    known: ClassVar = COLUMNS

    length: int

    @classmethod
    def of_source(cls, source: RecordSource, data: Any, **more: Any) -> Self:
        made = super().of_source(source, data, length=data.sequence_length, **more)
        named = {name for name, _ in made.columns}
        if named and not any(named.issuperset(form) for form in FORMS):
            forms = ", or ".join(" and ".join(form) for form in FORMS)
            raise UserError(f"--config.data.columns={data.columns}: name {forms}")
        return made

    @property
    def _settings(self) -> tuple[Any, ...]:
        return "conversations", self.columns, self.header, self.skip

    def _same_named(self, row: Row) -> dict[str, str]:
        """Return {}: rows of one file may have different forms."""
        return {}

    def _record(self, row: Row, columns: dict[str, str]) -> Fields:
        if row.problem:
            raise BadRow(row.problem)
        columns = columns or {name: name for name in self.known}
        found = {name: field_value(row.values, column) for name, column in columns.items()}
        values = {name: value for name, value in found.items() if value is not MISSING}
        forms = [form for form in FORMS if all(name in columns for name in form)]
        if not any(all(name in values for name in form) for form in forms):
            wanted = ", no ".join(" and ".join(columns[n] for n in form) for form in forms)
            there = ", ".join(row.values) or "none"
            problem = f"no {wanted} (available: {there})"
            if not self.source.same_columns:
                raise BadRow(problem)
            raise UserError(f"{row.where}: {problem}: set --config.data.columns")
        if self.source.same_columns:  # nested values too: missing entries are null
            values = without_nulls(values)
        messages, tools = conversation_of(values)
        return {"messages": messages, **({"tools": tools} if tools else {})}

    def texts(self, record: Fields) -> list[str]:
        return [all_text(record["messages"], record.get("tools"))]

    def encoder(self, tokenizer: Tokenizer) -> ConversationEncoder:
        return ConversationEncoder(ChatTemplate.of(tokenizer), self.length + 1)


def without_nulls(value: Any) -> Any:
    """Drop None values from nested mappings."""
    if isinstance(value, dict):
        return {name: without_nulls(one) for name, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class ConversationEncoder:
    """Encoder of conversations, truncated to whole turns that fit.

    Attributes:
        template: chat template.
        length: maximum number of tokens.
    """

    template: ChatTemplate
    length: int
    n_together: ClassVar[int] = 0

    @property
    def key(self) -> list[Any]:
        return ["conversations", _SPANS, self.template.source, self.length]

    def __call__(self, record: Fields) -> EncodedRecord | int:
        messages = record["messages"]
        chat = encode_messages(self.template, messages, record.get("tools"))
        if not len(chat.turns):
            raise BadRow("the chat template drops all text of the assistant")
        fitting = chat.turns[chat.turns[:, 1] <= self.length]
        if len(chat.ids) <= self.length:
            fitting = chat.turns
        # A message may have several spans: either all of it fits or none.
        whole = fitting[~np.isin(fitting[:, 2], chat.turns[len(fitting) :, 2])]
        n_lost = int((chat.turns[len(whole) :, 1] - chat.turns[len(whole) :, 0]).sum())
        if not len(whole):
            return n_lost
        end, last = len(chat.ids), len(messages)
        if end > self.length:
            end, last = int(whole[-1, 1]), int(whole[-1, 2]) + 1
        kept = {**record, "messages": messages[:last]}
        n_bytes = sum(len(content_text(message["content"]).encode()) for message in messages[:last])
        return EncodedRecord(
            kept,
            {"messages": chat.ids[:end]},
            {"messages": whole},
            {"messages": n_bytes},
            n_lost,
            cut=last < len(messages),
        )


@dataclass(frozen=True, eq=False)
class ChatTargets:
    """Tokenized conversation.

    Attributes:
        ids: token ids, int32 [n].
        turns: target spans, int32 [spans, 3] (`record_store.Record.turns`).
    """

    ids: np.ndarray
    turns: np.ndarray


def encode_messages(
    template: ChatTemplate, messages: Sequence[Message], tools: list[Any] | None
) -> ChatTargets:
    """Tokenize messages, and mark which tokens are targets (`messages.is_target_message`).

    Raises:
        BadRow: the template rejects the messages, or the tokenizer cannot encode them.
    """
    shown = [{name: v for name, v in message.items() if name != "weight"} for message in messages]
    try:
        chat = template.encode(shown, tools)
    except UserError as error:
        raise BadRow(str(error)) from error
    learned = np.array([is_target_message(message) for message in messages])
    is_target = chat.assistant & learned[chat.message]
    labels = np.where(is_target, chat.message, -1)
    borders = np.flatnonzero(np.diff(labels, prepend=-1, append=-1))
    # The label is constant between two borders; spans without one are not targets.
    starts, ends = borders[:-1], borders[1:]
    kept = labels[starts] >= 0
    turns = np.stack([starts, ends, labels[starts]], axis=1)[kept]
    return ChatTargets(chat.ids, turns.astype(np.int32))
