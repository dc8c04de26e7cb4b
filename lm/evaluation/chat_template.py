"""Chat templates of tokenizers: Jinja, with the names that those of Hugging Face folders use."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
from jinja2 import TemplateError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lm.data.tokenizer import Tokenizer
from lm.data.tokenizers.folder import FolderTokenizer
from lm.errors import UserError


class _Generation(Extension):
    """`{% generation %}`, which marks what an assistant says: its content."""

    tags = {"generation"}  # noqa: RUF012  as Jinja declares it

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTokenizer(FolderTokenizer):
    """Tokenizer for what a chat template makes: special tokens in a text are read as such.

    In other texts their names are characters like any, so that no text can forge one.
    """

    def encode(self, text: str) -> np.ndarray:
        ids = self._special_ids
        if not ids:
            return super().encode(text)
        names = "|".join(map(re.escape, sorted(ids, key=len, reverse=True)))
        found = [
            np.asarray([ids[part]]) if number % 2 else super(ChatTokenizer, self).encode(part)
            for number, part in enumerate(re.split(f"({names})", text))
            if part
        ]
        return np.concatenate([np.zeros(0, np.int32), *found]).astype(np.int32)

    @cached_property
    def _special_ids(self) -> dict[str, int]:
        names = {name for name in self.special_names.values() if name}
        names |= {token["content"] for token in self._added.values() if token.get("special")}
        names |= set(getattr(self.base, "added_tokens", ()))
        found = {name: self.token_id(name) for name in names}
        return {name: i for name, i in found.items() if i is not None}


def chat_tokenizer(tokenizer: Tokenizer) -> ChatTokenizer:
    """Return a tokenizer for chats; UserError if it has no chat template."""
    if not isinstance(tokenizer, FolderTokenizer) or tokenizer.chat_template is None:
        raise UserError("--apply_chat_template: the tokenizer of the run has no chat template")
    return ChatTokenizer.from_files(tokenizer.files())


def render_chat(
    tokenizer: FolderTokenizer, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool
) -> str:
    """Return messages as the prompt that the chat template of a tokenizer makes of them.

    Args:
        tokenizer: tokenizer of a model folder, with a chat template.
        messages: "role" and "content" of each.
        add_generation_prompt: end with what an answer follows; otherwise the last message is the
            beginning of the answer, and the prompt ends with it.

    Raises:
        UserError: the template does not take the messages.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
    names = {f"{role}_token": name for role, name in tokenizer.special_names.items() if name}
    values = {**names, "add_generation_prompt": add_generation_prompt}
    values |= {"tools": None, "documents": None}
    try:
        template = environment.from_string(tokenizer.chat_template or "")
        try:
            text = template.render(messages=list(messages), **values)
        except TemplateError:  # many templates refuse a system message
            messages = [message for message in messages if message["role"] != "system"]
            text = template.render(messages=messages, **values)
    except Exception as error:  # of the template's code
        raise UserError(f"the chat template: {type(error).__name__}: {error}") from error
    if add_generation_prompt:
        return text
    last = messages[-1]["content"]
    at = text.rfind(last.strip())
    if at < 0:
        raise UserError("the chat template leaves the beginning of an answer out")
    whole = last.lstrip()
    return text[: at + len(whole if text.startswith(whole, at) else last.strip())]


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
