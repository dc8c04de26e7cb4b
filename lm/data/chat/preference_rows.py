"""Preference records: a prompt with a chosen and a rejected completion, or a labeled completion.

Prompts and completions are texts, or lists of messages (`messages.py`) that the tokenizer's chat
template renders. Without a prompt, the common prefix of chosen and rejected is used. As in TRL
1.16, prompt and completion are tokenized together, and the completion starts where the tokens
differ from those of the prompt alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lm.data.chat.chat_template import ChatTemplate
from lm.data.chat.messages import all_text, as_messages, content_text, says_something, tools_of
from lm.data.record_store import EncodedRecord, RecordEncoder
from lm.data.records import BadRow, Fields, Records
from lm.data.row_documents import MISSING, field_value
from lm.data.sources import Row
from lm.data.tokenizer import Tokenizer
from lm.errors import UserError

Text = str | list[dict[str, Any]]

_LABELS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class PairRecords(Records):
    """Pairs: records with "prompt", "chosen", "rejected", optionally "tools" and "margin"."""

    known: ClassVar[tuple[str, ...]] = ("prompt", "chosen", "rejected", "margin", "tools")

    @property
    def _settings(self) -> tuple[Any, ...]:
        return (*super()._settings, type(self).__name__)

    def encoder(self, tokenizer: Tokenizer) -> RecordEncoder:
        """Return the encoder of prompts and completions."""
        return PreferenceEncoder(tokenizer, ChatTemplate.of(tokenizer))

    def texts(self, record: Fields) -> list[str]:
        """Return prompt and completions as texts."""
        parts = (record.get(name, "") for name in ("prompt", "chosen", "rejected", "completion"))
        return [part if isinstance(part, str) else all_text(part, None) for part in parts if part]

    def _same_named(self, row: Row) -> dict[str, str]:
        return {name: name for name in super()._same_named(row) and self.known}

    def _record(self, row: Row, columns: dict[str, str]) -> Fields:
        values = self._values(row, columns)
        require_values(values, columns, row, "chosen", "rejected")
        return pair_of(values)

    def _values(self, row: Row, columns: Mapping[str, str]) -> Fields:
        """Return the non-null values of a row by record column."""
        if row.problem:
            raise BadRow(row.problem)
        found = {name: field_value(row.values, column) for name, column in columns.items()}
        return {name: x for name, x in found.items() if x is not MISSING and x is not None}


@dataclass(frozen=True)
class LabeledRecords(PairRecords):
    """Records of "prompt", "completion" and "label" (whether the completion is desirable).

    A row that is a pair gives two records: first all chosen, then all rejected ones.
    """

    known: ClassVar = ("prompt", "completion", "label", "chosen", "rejected", "tools")

    def read(self, report: Callable[[str], object]) -> Iterator[tuple[Fields, str]]:
        """Yield records and their places, see `Records.read`."""
        for side in ("chosen", "rejected"):
            for record, where in super().read(report):
                if "completion" not in record:
                    completion = {"completion": record[side], "label": side == "chosen"}
                    kept = {name: x for name, x in record.items() if name in ("prompt", "tools")}
                    yield kept | completion, where
                elif side == "chosen":
                    yield record, where
            report = _ignore

    def _record(self, row: Row, columns: dict[str, str]) -> Fields:
        values = self._values(row, columns)
        if "completion" not in values and {"chosen", "rejected"} <= values.keys():
            return pair_of(values)
        require_values(values, columns, row, "completion", "label")
        label = _LABELS.get(str(values["label"]).strip().lower().removesuffix(".0"))
        if label is None:
            raise BadRow(f"label {values['label']!r} is neither true nor false")
        prompt, completion = _alike(values.get("prompt", ""), values["completion"])
        _require_text("completion", completion)
        return {**_tools(values), "prompt": prompt, "completion": completion, "label": label}


def require_values(
    values: Mapping[str, Any], columns: Mapping[str, str], row: Row, *names: str
) -> None:
    """Raise BadRow unless a row has these values.

    Args:
        values: values by record column.
        columns: source column of each record column.
        row: the row.
        *names: required record columns.
    """
    for name in names:
        if name not in values:
            there = ", ".join(row.values) or "none"
            problem = f"no column {columns.get(name, name)!r} (available: {there})"
            raise BadRow(f"{problem}: name it in --config.data.columns")


def _ignore(message: str) -> None:
    """Ignore a message that was already reported."""


def pair_of(values: Mapping[str, Any]) -> Fields:
    """Build the record of a pair.

    Args:
        values: values by record column.

    Raises:
        BadRow: a completion is empty, both are equal, or they are malformed.
    """
    chosen, rejected = _alike(values["chosen"], values["rejected"], ("chosen", "rejected"))
    if "prompt" in values:
        prompt, chosen = _alike(values["prompt"], chosen, ("prompt", "chosen"))
        _, rejected = _alike(values["prompt"], rejected, ("prompt", "rejected"))
    else:
        n = _common_beginning(chosen, rejected)
        prompt, chosen, rejected = chosen[:n], chosen[n:], rejected[n:]
    for name, completion in (("chosen", chosen), ("rejected", rejected)):
        _require_text(name, completion)
    if chosen == rejected:
        raise BadRow("chosen and rejected are equal")
    margin = {}
    if "margin" in values:
        try:
            margin["margin"] = float(values["margin"])
        except (TypeError, ValueError):
            raise BadRow(f"margin {values['margin']!r} is not a number") from None
        if not np.isfinite(margin["margin"]):
            raise BadRow(f"margin {values['margin']!r} is not a finite number")
    pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return {**_tools(values), **margin, **pair}


def _alike(first: Any, second: Any, names: tuple[str, str] = ("prompt", "completion")) -> Any:
    """Return two values as texts, or as messages if one of them is a list."""
    if isinstance(first, str) and isinstance(second, str):
        for name, text in zip(names, (first, second), strict=True):
            _require_utf8(name, text)
        return first, second
    roles = ("user" if name == "prompt" else "assistant" for name in names)
    return tuple(
        as_messages(name, value, role)
        for name, value, role in zip(names, (first, second), roles, strict=True)
    )


def _require_utf8(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{name!r} is not UTF-8 at character {error.start}") from error


def _require_text(name: str, completion: Text) -> None:
    """Raise BadRow if a completion is blank."""
    if isinstance(completion, str):
        says = bool(completion.strip())
    else:
        says = any(map(says_something, completion))
        if completion and completion[-1]["role"] != "assistant":
            raise BadRow(f"{name!r} does not end with an assistant message")
    if not says:
        raise BadRow(f"{name!r} is empty")


def _tools(values: Mapping[str, Any]) -> Fields:
    tools = tools_of(values)
    return {"tools": tools} if tools else {}


def _common_beginning(first: Text, second: Text) -> int:
    """Return the length of the common prefix of two texts or message lists.

    For texts, a space before the difference belongs to the completions; neither completion is
    empty.
    """
    shorter = min(len(first), len(second))
    n = next((i for i in range(shorter) if first[i] != second[i]), max(shorter - 1, 0))
    return n - 1 if n and first[n - 1] == " " else n


@dataclass(frozen=True)
class PreferenceEncoder:
    """Encoder of prompts and completions.

    A text starts with the tokenizer's bos, if any, and a completion ends with its eos. A prompt
    without tokens becomes the token that documents start with: bos, or else eos.

    Attributes:
        tokenizer: tokenizer.
        template: its chat template.
        length: 0: nothing is truncated.
    """

    tokenizer: Tokenizer
    template: ChatTemplate
    length: int = 0
    n_together: ClassVar[int] = 0

    @property
    def key(self) -> list[Any]:
        """Settings that the tokens depend on, besides tokenizer and records."""
        return ["preferences", self.template.source]

    def __call__(self, record: Fields) -> EncodedRecord:
        """Tokenize the prompt and completions of a record."""
        names = [name for name in ("chosen", "rejected", "completion") if name in record]
        prompt, tools = record["prompt"], record.get("tools")
        try:
            before = self._prompt(prompt, tools)
            whole = [self.whole(prompt, record[name], tools) for name in names]
        except UserError as error:
            raise BadRow(str(error)) from error
        n = min(_common_beginning_of_tokens(before, ids) for ids in whole)
        tokens = {"prompt": whole[0][:n]}
        for name, ids in zip(names, whole, strict=True):
            if len(ids) == n:
                raise BadRow(f"{name!r} has no tokens")
            tokens[name] = ids[n:]
        if len(names) > 1 and np.array_equal(whole[0], whole[1]):
            raise BadRow("chosen and rejected have the same tokens")
        if not n:
            starts = (self.tokenizer.bos_id, self.tokenizer.eos_id)
            first = [start for start in starts if start is not None][:1]
            tokens["prompt"] = np.asarray(first, np.int32)
        sizes = {name: len(_as_text(record[name]).encode()) for name in tokens}
        return EncodedRecord(record, tokens, {}, sizes, n_lost=0, cut=False)

    def _prompt(self, prompt: Text, tools: Any) -> np.ndarray:
        if not prompt:
            return np.zeros(0, np.int32)
        if isinstance(prompt, str):
            return self._text(prompt)
        return self.template.encode(prompt, tools, add_generation_prompt=True).ids

    def whole(self, prompt: Text, completion: Text, tools: Any) -> np.ndarray:
        """Tokenize a prompt with its completion, both texts or both lists of messages.

        Args:
            prompt: prompt.
            completion: completion.
            tools: JSON schemas that messages may refer to, or None.

        Raises:
            UserError: they cannot be encoded.
        """
        if isinstance(completion, str):
            assert isinstance(prompt, str)
            ids, eos = self._text(prompt + completion), self.tokenizer.eos_id
            ends = [] if eos is None or (len(ids) and ids[-1] == eos) else [eos]
            return np.concatenate([ids, np.asarray(ends, np.int32)])
        return self.template.encode([*prompt, *completion], tools).ids

    def _text(self, text: str) -> np.ndarray:
        bos = self.tokenizer.bos_id
        starts = [] if bos is None else [bos]
        return np.concatenate([np.asarray(starts, np.int32), self.tokenizer.encode(text)])


def _common_beginning_of_tokens(prompt: np.ndarray, whole: np.ndarray) -> int:
    n = min(len(prompt), len(whole))
    different = np.flatnonzero(prompt[:n] != whole[:n])
    return int(different[0]) if len(different) else n


def _as_text(value: Text) -> str:
    return value if isinstance(value, str) else "".join(content_text(m["content"]) for m in value)
