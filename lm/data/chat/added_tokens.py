"""Tokens and chat template that a configuration adds to a tokenizer.

`data.added_tokens` lists the tokens, or is "template": the special tokens of the chat template,
unless that is the tokenizer's own. The template comes from `data.chat_template`, else the
tokenizer, else the library. Tokens and template are saved with the run's tokenizer and exported
with it; so is `data.chat_markers`, except for export.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from lm.config.registry import listed
from lm.data.chat.chat_template import DEFAULT_TEMPLATE, ChatTemplate
from lm.data.chat.extended_tokenizer import ExtendedTokenizer
from lm.data.files import find_file
from lm.data.tokenizer import Tokenizer
from lm.errors import UserError

OF_TEMPLATE = "template"
_TOKENS = ("<|im_start|>", "<|im_end|>")  # of the library's template


def extended(tokenizer: Tokenizer, data: Any, default: str = "") -> Tokenizer:
    """Extend a tokenizer with the added tokens and chat template of a configuration.

    Args:
        tokenizer: the tokenizer.
        data: section `data` of the configuration.
        default: value of `data.added_tokens` if that is empty.

    Raises:
        UserError: the template is not readable, or ordinary text already produces one of the
            tokens.
    """
    old = tokenizer if isinstance(tokenizer, ExtendedTokenizer) else ExtendedTokenizer(tokenizer)
    jinja = old.jinja
    if data.chat_template:
        jinja = _read(data.chat_template, data)
    elif not old.chat_templates:
        jinja = DEFAULT_TEMPLATE.read_text()
    names = list(dict.fromkeys(listed(data.added_tokens or default)))
    if names == [OF_TEMPLATE]:
        names = [name for name in _TOKENS if name in jinja]
    known = [name for name in names if name in old.names or _is_special(old.base, name)]
    names = [*old.names, *(name for name in names if name not in known)]
    made = replace(old, names=tuple(names), jinja=jinja, reads_markers=data.chat_markers)
    for line in _likely_surprises(ChatTemplate.of(made)):
        print(f"note: the chat template {line}", file=sys.stderr)
    return tokenizer if made == old else made


def _likely_surprises(template: ChatTemplate) -> Iterator[str]:
    """Yield warnings about unexpected behavior of a template."""
    if not template.has_role_tokens:
        yield "marks turns by words: messages can contain them too, and no token ends an answer"
    if "strftime_now" in template.source:
        yield "contains the current date: stored conversations keep the date of tokenization"


def _is_special(tokenizer: Tokenizer, name: str) -> bool:
    """Return whether the vocabulary has this token and never produces it from text."""
    found = tokenizer.token_id(name)
    return found is not None and found not in tokenizer.encode(name)


def _read(path: str, data: Any) -> str:
    file = find_file(path, data)
    try:
        text = file.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config.data.chat_template={path}: {error}") from error
    if not text.strip():
        raise UserError(f"--config.data.chat_template={path}: the file is empty")
    return text
