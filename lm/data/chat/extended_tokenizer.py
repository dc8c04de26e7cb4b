"""Tokenizer that adds special tokens and a chat template to another tokenizer.

Ids of the added tokens follow those of the base tokenizer, which tokenizes all text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, ClassVar, Self

import numpy as np

from lm.config.registries import TOKENIZERS
from lm.data.tokenizer import Template, Tokenizer
from lm.storage import parse_json

_ABOUT, _TEMPLATE, _BASE = "added_tokens.json", "chat_template.jinja", "base/"


@dataclass(frozen=True)
class ExtendedTokenizer(Tokenizer):
    """Tokenizer with added tokens.

    Attributes:
        base: tokenizer of texts.
        names: added tokens, whose ids follow those of `base`.
        jinja: source of the chat template; "": that of `base`.
        reads_markers: chat templates parse special tokens inside messages too.
    """

    base: Tokenizer
    names: tuple[str, ...] = ()
    jinja: str = ""
    reads_markers: bool = False
    kind: ClassVar[str] = "run"

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """Jinja sources of the chat templates by name."""
        of_base = getattr(self.base, "chat_templates", {})
        return {"default": self.jinja} if self.jinja else of_base

    @cached_property
    def vocab_size(self) -> int:  # type: ignore[override]
        return self.base.vocab_size + len(self.names)

    @property
    def bos_id(self) -> int | None:
        return self.base.bos_id

    @property
    def eos_id(self) -> int | None:
        return self.base.eos_id

    @property
    def n_text_ids(self) -> int:
        return self.vocab_size if self.names else self.base.n_text_ids

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self.base.stop_ids

    @property
    def template(self) -> Template:
        return self.base.template

    @property
    def states_template(self) -> bool:  # type: ignore[override]
        """True if `template` comes from a model folder."""
        return self.base.states_template

    def role_id(self, role: str) -> int | None:
        return self.base.role_id(role)

    def encode(self, text: str) -> np.ndarray:
        return self.base.encode(text)

    def encode_batch(self, texts: Any) -> list[np.ndarray]:
        return self.base.encode_batch(texts)

    def decode(self, ids: Iterable[int]) -> str:
        first = self.base.vocab_size
        parts = groupby(map(int, ids), lambda i: i >= first)
        return "".join(
            "".join(self.names[i - first] for i in part) if is_added else self.base.decode(part)
            for is_added, part in parts
        )

    def token_id(self, name: str) -> int | None:
        if name in self.names:
            return self.base.vocab_size + self.names.index(name)
        return self.base.token_id(name)

    def pieces(self) -> list[str]:
        return [*self.base.pieces(), *self.names]

    def shared_ids(self, other: Tokenizer) -> int:
        """Return another tokenizer's vocabulary size if all its ids mean the same here, else 0."""
        base: Tokenizer = other
        names: tuple[str, ...] = ()
        if isinstance(other, ExtendedTokenizer):
            base, names = other.base, other.names
        is_same = base.digest == self.base.digest and self.names[: len(names)] == names
        return other.vocab_size if is_same else 0

    def files(self) -> dict[str, bytes]:
        files = {f"{_BASE}{name}": content for name, content in self.base.files().items()}
        about = {"names": self.names, "reads_markers": self.reads_markers}
        files[_ABOUT] = json.dumps({"kind": self.base.kind, **about}).encode()
        return files | ({_TEMPLATE: self.jinja.encode()} if self.jinja else {})

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Self:
        about = parse_json(files[_ABOUT], _ABOUT)
        of_base = {
            name.removeprefix(_BASE): content
            for name, content in files.items()
            if name.startswith(_BASE)
        }
        base = TOKENIZERS[about["kind"]].from_files(of_base)
        jinja = files.get(_TEMPLATE, b"").decode()
        return cls(base, tuple(about["names"]), jinja, about["reads_markers"])
