"""Chat templates: tokens of a conversation, and which of them the assistant says.

The template is the tokenizer's own, with the semantics of transformers' `apply_chat_template`, or
the library's. The content of a message is always plain text: the name of a special token in it is
encoded as ordinary characters, so no text can end a turn or start another. If a template marks
turns by words alone ("### Assistant:"), text can contain the same words; `has_role_tokens` is
False.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lm.data.chat.chat_encoder import ChatEncoder, Tokens, role_names
from lm.data.chat.ownership import (
    MARKS,
    Traced,
    compare,
    first_difference,
    keys_of,
    longest_of,
    replaced,
    with_edges,
    with_other_edges,
)
from lm.data.tokenizer import Tokenizer
from lm.errors import UserError

if TYPE_CHECKING:
    from lm.data.chat.jinja_templates import JinjaTemplate

DEFAULT_TEMPLATE = Path(__file__).with_name("default_template.jinja")
_REASONING = ("reasoning_content", "thinking", "reasoning")
_TAG = "\U0010fffb "  # after a message to be continued; the space shows whether it was trimmed
_ABSENT = "\U0010fffa"  # in place of an empty message
_USER = {"role": "user", "content": "\ufdd0"}  # of short conversations that probe a template
_ANSWER = {"role": "assistant", "content": "\ufdd1"}

Message = Mapping[str, Any]


@dataclass(frozen=True)
class EncodedChat:
    """Tokenized conversation.

    Attributes:
        ids: int32 [L].
        assistant: bool [L]: said by the assistant, including the token that ends its turn.
        message: int32 [L]: index of the message that a token and its surroundings belong to; the
            number of messages for the generation prompt.
    """

    ids: np.ndarray
    assistant: np.ndarray
    message: np.ndarray


@dataclass(frozen=True)
class ChatTemplate:
    """Chat template of a tokenizer.

    Attributes:
        tokenizer: the tokenizer.
        sources: Jinja sources by name: "default" and optionally "tool_use".
        reads_markers: parse special tokens inside messages too, as transformers does by default.
    """

    tokenizer: Tokenizer
    sources: Mapping[str, str] = field(repr=False)
    reads_markers: bool = False

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """Return the template of a tokenizer, or the library's if it has none."""
        found = getattr(tokenizer, "chat_templates", {})
        reads_markers = getattr(tokenizer, "reads_markers", False)
        return cls(tokenizer, found or {"default": DEFAULT_TEMPLATE.read_text()}, reads_markers)

    @property
    def source(self) -> str:
        """Concatenated Jinja source of all templates."""
        return "\n".join(text for _, text in sorted(self.sources.items()))

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Render a conversation as text.

        Args:
            messages: see `encode`, like all others.
            tools: JSON schemas.
            add_generation_prompt: append the generation prompt.
            continue_final_message: the last message is the start of an answer.
            documents: texts.
            **variables: further variables.
        """
        work = _Conversation.of(messages, tools, documents, variables, continue_final_message)
        return self._text(work, add_generation_prompt, datetime.now())

    def encode(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> EncodedChat:
        """Tokenize a conversation.

        Args:
            messages: "role", "content" and other keys that the template reads.
            tools: JSON schemas of functions that may be called.
            add_generation_prompt: append the generation prompt.
            continue_final_message: the last message is the start of an answer.
            documents: texts for the template.
            **variables: further template variables.

        Raises:
            UserError: the template rejects the conversation, or message text cannot be
                distinguished from the template's own text.
        """
        work = _Conversation.of(messages, tools, documents, variables, continue_final_message)
        traced, places = self._traced(work, add_generation_prompt)
        owned = None if self.reads_markers else traced.owner >= 0
        tokens = self._encoder.encode(traced.text, owned, self._guarded)
        said, message = self._layout(work, traced, places, add_generation_prompt)
        first = np.minimum(tokens.starts, len(message) - 1)
        return EncodedChat(tokens.ids, _any_of(said, tokens), message[first])

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids that end an assistant turn."""
        before_next = self._parts[2]
        common = before_next[: _n_common(self._last_end, before_next)]
        texts = (common, self._last_end, before_next)
        found = [self._names.findall(text) if self._names else [] for text in texts]
        end = found[0][-1:] or found[1][:1] or found[2][:1]
        own = [self._guarded[name] for name in end]
        return tuple(dict.fromkeys((*own, *self.tokenizer.stop_ids)))

    @cached_property
    def has_role_tokens(self) -> bool:
        """True if turns are marked by tokens rather than by words, which text can contain too.

        Raises:
            UserError: a template is not valid Jinja.
        """
        for template in self._templates:
            template.check()
        return any(name in self._turns for name in self._guarded)

    # --- properties of the template

    @cached_property
    def _encoder(self) -> ChatEncoder:
        return ChatEncoder(self.tokenizer)

    def _probe(self, *messages: Message, add_generation_prompt: bool = False) -> str:
        """Render a short conversation; "" if the template rejects it."""
        try:
            return self._text(_Conversation.of(messages), add_generation_prompt, datetime.now())
        except UserError:
            return ""

    @cached_property
    def _prompt(self) -> str:
        """Generation prompt: text that follows a question only if an answer is requested."""
        plain, asking = (
            self._probe(_USER, add_generation_prompt=asked).partition(_USER["content"])[2]
            for asked in (False, True)
        )
        n_same = _n_common(plain, asking)
        for name in self._added.finditer(asking) if self._added else ():
            if name.start() < n_same < name.end():
                n_same = name.start()
        return asking[n_same:]

    @cached_property
    def _parts(self) -> tuple[str, str, str, str]:
        """Template text around a question, an answer and a question."""
        text = self._probe(_USER, _ANSWER, _USER)
        before, _, rest = text.partition(_USER["content"])
        header, _, rest = rest.partition(_ANSWER["content"])
        return before, header, *rest.partition(_USER["content"])[::2]

    @cached_property
    def _headers(self) -> list[str]:
        """Texts that start an assistant turn, longest first.

        They are what the generation prompt and an earlier turn have in common, and prefixes of it.
        """
        prompt, names = self._prompt, self._added
        ends = {len(prompt), *(line.end() for line in re.finditer("\n", prompt))}
        ends |= {name.end() for name in names.finditer(prompt)} if names else set()
        cuts = [prompt[:end] for end in sorted(ends - {0}, reverse=True)]
        return [cut for cut in cuts if cut in self._parts[1]]

    @cached_property
    def _words(self) -> str:
        """Words such as "[/INST]" before an answer, for templates without a generation prompt."""
        asking = self._probe(_USER, add_generation_prompt=True).partition(_USER["content"])[2]
        header = self._parts[1]
        is_all = not self._headers and header.startswith(asking)
        return asking.lstrip() if is_all and not header[len(asking) :].strip() else ""

    @cached_property
    def _added(self) -> re.Pattern[str] | None:
        return longest_of({**self._encoder.special, **self._encoder.ordinary})

    @cached_property
    def _turns(self) -> str:
        """Template text of a short conversation, up to the last part that opens a turn."""
        before, header, *after = self._parts
        for cut in self._headers[:1]:
            opening = self._added.search(cut) if self._added else None
            header = header[: header.index(cut) + (opening.end() if opening else len(cut))]
        return "\0".join((before, header, *after))

    @cached_property
    def _guarded(self) -> dict[str, int]:
        """Tokens that only the template may produce: special tokens, and others that mark turns.

        Excludes words that the template looks for in text, such as "</think>".
        """
        looked_for = [text for template in self._templates for text in template.inspected]
        return self._encoder.special | {
            name: i
            for name, i in self._encoder.ordinary.items()
            if name.strip() and name in self._turns and not any(name in text for text in looked_for)
        }

    @property
    def _templates(self) -> list[JinjaTemplate]:
        return list(map(_compiled, self.sources.values()))

    @cached_property
    def _last_end(self) -> str:
        """Template text after an answer that is the last message."""
        return self._probe(_USER, _ANSWER).partition(_ANSWER["content"])[2]

    @cached_property
    def _ends(self) -> list[str]:
        """Texts that end an assistant turn, up to a special token; longest first."""
        names = self._names.finditer(self._last_end) if self._names else ()
        return [self._last_end[: name.end()].lstrip() for name in names][::-1]

    @cached_property
    def _names(self) -> re.Pattern[str] | None:
        return longest_of(self._guarded)

    # --- rendering

    def _template(self, has_tools: bool) -> JinjaTemplate:
        name = "tool_use" if has_tools and "tool_use" in self.sources else "default"
        if name not in self.sources:
            names = ", ".join(sorted(self.sources))
            raise UserError(f"the tokenizer has no default chat template, only {names}")
        return _compiled(self.sources[name])

    def _text(
        self, work: _Conversation, add_generation_prompt: bool, now: datetime, **more: Any
    ) -> str:
        names = {f"{role}_token": name for role, name in self._roles.items()}
        values = {
            "tools": work.tools,
            "documents": work.documents,
            "messages": work.tagged if work.continue_final_message else work.messages,
            "add_generation_prompt": add_generation_prompt,
        }
        template = self._template(work.tools is not None)
        text = template.render({**names, **work.variables, **values, **more}, now)
        return _cut(text) if work.continue_final_message else text

    @cached_property
    def _roles(self) -> dict[str, str]:
        return role_names(self.tokenizer)

    def _traced(
        self, work: _Conversation, add_generation_prompt: bool
    ) -> tuple[Traced, dict[int, int]]:
        """Return the text with its owners, and where messages without characters are."""
        now = datetime.now()
        text = self._text(work, add_generation_prompt, now)
        template = self._template(work.tools is not None)
        names = self._names
        for words in (None, template.inspected, template.constants):
            other = work.replaced(names, words)

            def outline(work: _Conversation) -> str:
                return self._text(work, add_generation_prompt, now, generation_marks=MARKS)

            try:
                found = compare(text, outline(other), work.n_owners)
            except UserError:  # the template rejects the messages without these words
                continue
            if found:
                if (edged := other.with_other_edges()) != other:
                    with suppress(UserError):
                        found = with_edges(found, outline(edged))
                places = {}
                for i in set(range(len(work.messages))) - set(found.owner.tolist()):
                    if (at := first_difference(found, outline(other.with_sign(i)))) is not None:
                        places[i] = at
                return found, places
        raise UserError(
            "the chat template changes the text of messages so that it cannot be "
            "distinguished from its own"
        )

    # --- attribution of characters to messages

    def _layout(
        self, work: _Conversation, traced: Traced, places: Mapping[int, int], has_prompt: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return what the assistant says, bool [L], and each character's message, int32 [L]."""
        text, length = traced.outline, len(traced.text)
        names = self._names
        marked = self._template(work.tools is not None).marks_generation
        said = traced.said.copy() if marked else np.zeros(length, bool)
        message = np.zeros(length, np.int32)
        spans = _spans(traced.whole, len(work.messages), places)
        before = 0  # end of the text of earlier messages
        for number, (i, start, stop) in enumerate(spans):
            is_last = number + 1 == len(spans)
            if work.messages[i]["role"] == "assistant":
                stop = self._own_end(traced, start, stop)
            limit = length if is_last else spans[number + 1][1]
            if is_last and has_prompt and text.endswith(self._prompt):
                limit = max(stop, length - len(self._prompt))
            found = list(names.finditer(text, stop, limit)) if names else []
            ends = [name.end() for name in found]
            end = stop
            if work.messages[i]["role"] == "assistant":
                known = (
                    text.find(last, stop, limit) + len(last)
                    for last in self._ends
                    if last in text[stop:limit]
                )
                end = next(known, min(ends, default=stop))
                if marked:
                    end = max([end, *(stop + 1 + np.flatnonzero(said[stop:limit]))])
                else:
                    said[self._beginning(text, before, start) : end] = True
            elif len(ends) > 1:
                end = ends[0]
            if is_last:
                end = limit
            elif end > stop or not ends:
                end += len(text[end:limit]) - len(text[end:limit].lstrip())
            message[before:end] = i
            before = end
        message[before:] = (
            len(work.messages) if has_prompt else message[before - 1 : before].max(initial=0)
        )
        return said, message

    def _own_end(self, traced: Traced, start: int, stop: int) -> int:
        """Return where an assistant's text ends, before another turn that quotes it."""
        header = next(iter(self._headers), "")
        opening = self._names.match(header) if self._names else None
        if opening is None:
            return stop
        at = traced.outline.find(opening[0], start, stop)
        while at >= 0 and traced.outline.startswith(header, at):
            at = traced.outline.find(opening[0], at + 1, stop)
        own = np.flatnonzero(traced.whole[start : max(at, start)] >= 0)
        return stop if at < 0 else start + 1 + int(own[-1])

    def _beginning(self, text: str, start: int, stop: int) -> int:
        """Return the start of an answer whose first own character is at `stop`.

        Without a generation prompt, it follows the words or the token before it, including white
        space.
        """
        for header in self._headers:
            if (at := text.rfind(header, start, stop)) >= 0:
                return at + len(header)
        if (words := self._words) and (at := text.rfind(words, start, stop)) >= 0:
            return at + len(words)
        names = list(self._names.finditer(text, start, stop)) if self._names else []
        after = names[-1].end() if names else stop
        return stop if self._headers or text[after:stop].strip() else after


@dataclass(frozen=True)
class _Conversation:
    """Template inputs, as plain JSON types.

    Attributes:
        messages: messages without None values.
        tools: JSON schemas, or None.
        documents: texts for the template, or None.
        variables: further variables.
        continue_final_message: the last message is the start of an answer.
    """

    messages: list[dict[str, Any]]
    tools: Any = None
    documents: Any = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    continue_final_message: bool = False

    @classmethod
    def of(
        cls,
        messages: Any,
        tools: Any = None,
        documents: Any = None,
        variables: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> _Conversation:
        found = []
        for number, message in enumerate(messages, 1):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise UserError(f"message {number} is not an object with a string as its role")
            known = {name: value for name, value in message.items() if value is not None}
            reasoning = next((known[name] for name in _REASONING if name in known), None)
            if reasoning is not None:
                known = {"thinking": reasoning, **known, "reasoning_content": reasoning}
            found.append(_plain(known))
        if not found:
            raise UserError("the conversation has no messages")
        made = cls(
            found,
            _plain(tools),
            _plain(documents),
            _plain(dict(variables or {})),
            continue_final_message,
        )
        try:
            json.dumps([found, made.tools, made.documents], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the conversation is not valid Unicode ({error.reason})") from error
        return made

    @property
    def n_owners(self) -> int:
        """Number of messages, plus one for everything else."""
        return len(self.messages) + 1

    def replaced(
        self, names: re.Pattern[str] | None, words: Collection[str] | None
    ) -> _Conversation:
        """Replace the characters of texts by markers of their owners.

        Args:
            names: pattern of token names, of which no character may stay.
            words: texts that the template looks for; they stay, as do names of keys. None: none.
        """
        rest: list[Any] = [self.tools, self.documents, self.variables]
        values = [list(message.values()) for message in self.messages]
        keys = set() if words is None else keys_of([*values, *rest])
        kept = longest_of([word for word in words or () if not (names and names.search(word))])
        messages = [replaced(x, i, names, kept, keys) for i, x in enumerate(self.messages)]
        tools, documents, variables = (
            replaced(value, len(messages), names, kept, keys) for value in rest
        )
        return _Conversation(messages, tools, documents, variables, self.continue_final_message)

    def with_other_edges(self) -> _Conversation:
        """Replace the white space around what assistants say."""
        messages = [
            message | {"content": with_other_edges(message["content"], _ABSENT)}
            if message["role"] == "assistant" and isinstance(message.get("content"), str)
            else message
            for message in self.messages
        ]
        return replace(self, messages=messages)

    def with_sign(self, i: int) -> _Conversation:
        """Replace the text of a message by a marker."""
        messages = [*self.messages]
        messages[i] = messages[i] | {"content": _ABSENT}
        return replace(self, messages=messages)

    @property
    def tagged(self) -> list[dict[str, Any]]:
        """Messages, with a tag after the text of the last one."""
        last, content = self.messages[-1], self.messages[-1].get("content")
        if isinstance(content, str):
            return [*self.messages[:-1], last | {"content": content + _TAG}]
        parts = content if isinstance(content, list) else []
        texts = [at for at, part in enumerate(parts) if isinstance(part, dict) and "text" in part]
        if not texts:
            raise UserError("the last message has no text to continue from")
        at = texts[-1]
        part = parts[at] | {"text": parts[at]["text"] + _TAG}
        return [*self.messages[:-1], last | {"content": [*parts[:at], part, *parts[at + 1 :]]}]


def _plain(value: Any) -> Any:
    """Convert nested mappings and sequences to plain dictionaries and lists."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _n_common(one: str, two: str) -> int:
    """Return the length of the common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False)))


def _cut(text: str) -> str:
    """Return the text before the tag; UserError if the template drops it."""
    at = text.rfind(_TAG.strip())
    if at < 0:
        raise UserError("the chat template drops the start of an answer")
    return text[:at] if text.startswith(_TAG, at) else text[:at].rstrip()


def _spans(
    owner: np.ndarray, n_messages: int, places: Mapping[int, int]
) -> list[tuple[int, int, int]]:
    """Return the spans of messages in order: index, first character, end.

    Args:
        owner: int32 [L], index of a message or another number.
        n_messages: number of messages.
        places: positions of messages without characters.
    """
    at = np.flatnonzero((owner >= 0) & (owner < n_messages))
    firsts = np.flatnonzero(np.diff(owner[at], prepend=-1))
    lasts = np.append(firsts[1:], len(at))[: len(firsts)] - 1
    spans = [
        (int(owner[at[a]]), int(at[a]), int(at[b]) + 1) for a, b in zip(firsts, lasts, strict=True)
    ]
    spans += [(i, place, place) for i, place in places.items()]
    return sorted(spans, key=lambda span: (span[1], span[2], span[0]))


def _any_of(said: np.ndarray, tokens: Tokens) -> np.ndarray:
    """Return which tokens contain a said character, bool."""
    before = np.concatenate([[0], np.cumsum(said)])
    return before[tokens.ends] > before[tokens.starts]


def _compiled(source: str) -> JinjaTemplate:
    # Lazy, so that code without conversations runs without jinja2.
    from lm.data.chat.jinja_templates import jinja_template

    return jinja_template(source)
