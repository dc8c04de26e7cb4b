"""Conversations as decoding inputs: token ids and stop conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm.data.chat.messages import Message, as_messages, messages_of, tools_of
from lm.data.records import BadRow
from lm.data.tokenizer import Tokenizer
from lm.decoding.controls import Controls
from lm.decoding.prompts import generates_text, is_encoder_decoder
from lm.errors import UserError
from lm.experiment import Experiment
from lm.parallel.mesh import print_on_primary_host

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from lm.data.chat.chat_template import ChatTemplate

_PROBE = "\ufdd0"


@dataclass(frozen=True)
class Chat:
    """Conversation to be answered.

    Attributes:
        messages: its messages; a final assistant message is continued.
        tools: JSON schemas of available tools, or None.
    """

    messages: Sequence[Message]
    tools: Sequence[Any] | None = None


def chat_of(values: Mapping[str, Any], system: str | None = None) -> Chat:
    """Parse the conversation of a row: "messages", ShareGPT's "conversations", or a "prompt".

    Args:
        values: values by column.
        system: system prompt for conversations without one.

    Raises:
        BadRow: there is no conversation, or it is malformed.
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
    before = [] if first in ("system", "developer") else system_message(system)
    return Chat([*before, *messages], tools_of(values))


def chat_ids(template: ChatTemplate, chat: Chat) -> list[int]:
    """Tokenize a conversation up to the start of its answer.

    Raises:
        UserError: the template rejects it.
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
    """Return the controls of a resolved configuration, with end-of-turn tokens added."""
    return Controls.from_config(config, tokenizer, template.stop_ids)


def chat_template(experiment: Experiment) -> ChatTemplate:
    """Return the chat template of a run's tokenizer, or the default one.

    A line on stderr warns if turns are marked only by words.

    Raises:
        UserError: the model does not continue texts, or jinja2 is not installed.
    """
    if not generates_text(experiment) or is_encoder_decoder(experiment.model):
        raise UserError("a chat needs a decoder, which continues texts")
    from lm.data.chat.chat_template import ChatTemplate

    assert experiment.tokenizer is not None
    template = ChatTemplate.of(experiment.tokenizer)
    if not template.has_role_tokens:
        print_on_primary_host(
            "note: the chat template marks turns by words, which a message can imitate"
        )
    return template


def stop_texts(template: ChatTemplate) -> tuple[str, ...]:
    """Return texts that follow an assistant turn, if only words mark turns."""
    if template.has_role_tokens:
        return ()
    said = [{"role": role, "content": _PROBE} for role in ("user", "assistant", "user")]
    between = template.render(said).split(_PROBE)[2].strip()
    return (between.splitlines()[0],) if between else ()


def system_message(system: str | None) -> list[Message]:
    """Return the message of a system prompt, or []."""
    return [{"role": "system", "content": system}] if system else []
