"""Tokenization of rendered conversations, in which only the template produces special tokens.

A tokenizer that parses special tokens in text gives the same ids as transformers. If it would also
parse them in the text of messages, the template's special tokens are renamed to names that no text
contains, so that names inside messages are tokenized as ordinary characters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import sentencepiece

from lm.data.chat.extended_tokenizer import ExtendedTokenizer
from lm.data.chat.ownership import codes, longest_of
from lm.data.tokenizer import Tokenizer
from lm.data.tokenizers.basic import ByteTokenizer, CharTokenizer, WordTokenizer
from lm.data.tokenizers.folder import FolderTokenizer
from lm.data.tokenizers.hf import Gpt2Tokenizer, HuggingFaceTokenizer, package_errors
from lm.data.tokenizers.sentencepiece import SPACE_MARK, SentencePieceTokenizer
from lm.errors import UserError

_PRIVATE = range(0xF0000, 0x110000)  # planes 15 and 16, except for their last characters
_UNUSABLE = "the tokenizer cannot be used"


@dataclass(frozen=True)
class Tokens:
    """Tokens of a text with their character spans.

    Attributes:
        ids: int32 [L].
        starts: index of the first character of each token, [L].
        ends: index after its last character, [L]; tokens of the same character share it.
    """

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def shifted(self, by: int) -> Tokens:
        """Shift the character spans."""
        return Tokens(self.ids, self.starts + by, self.ends + by)


def joined(parts: Sequence[Tokens]) -> Tokens:
    """Concatenate the tokens of consecutive texts."""
    nothing = np.zeros(0, np.int32)
    return Tokens(
        *(
            np.concatenate([nothing, *(getattr(part, name) for part in parts)]).astype(np.int32)
            for name in ("ids", "starts", "ends")
        )
    )


def role_names(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the names of special tokens by role, such as bos, as used by templates."""
    match tokenizer:
        case ExtendedTokenizer():
            return role_names(tokenizer.base)
        case FolderTokenizer():
            return {role: name for role, name in tokenizer.special_names.items() if name}
        case WordTokenizer():
            return {}  # the words tokenizer's eos is a newline
        case _:
            ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
            ids |= {role: tokenizer.role_id(role) for role in ("pad", "cls", "sep", "mask")}
            pieces = tokenizer.pieces() if any(i is not None for i in ids.values()) else []
            return {role: pieces[i] for role, i in ids.items() if i is not None and pieces[i]}


def added_tokens(tokenizer: Tokenizer) -> dict[str, bool]:
    """Return tokens that are split off from text, with whether each is special."""
    match tokenizer:
        case ExtendedTokenizer():
            return added_tokens(tokenizer.base) | dict.fromkeys(tokenizer.names, True)
        case FolderTokenizer():
            return added_tokens(tokenizer.base) | tokenizer.added_tokens
        case HuggingFaceTokenizer():
            return dict(tokenizer.added_tokens)
        case SentencePieceTokenizer():
            model = _sentencepiece(tokenizer.model)
            ids = range(model.vocab_size())
            return {model.id_to_piece(i): True for i in ids if model.is_control(i)}
    return {}


@lru_cache(maxsize=4)
def _sentencepiece(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


@dataclass(frozen=True)
class ChatEncoder:
    """Encoder of rendered conversations.

    Attributes:
        tokenizer: the tokenizer.
    """

    tokenizer: Tokenizer

    @cached_property
    def special(self) -> dict[str, int]:
        """Id of each special token by name."""
        names = [name for name, is_special in added_tokens(self.tokenizer).items() if is_special]
        return self._known([*names, *role_names(self.tokenizer).values()])

    @cached_property
    def ordinary(self) -> dict[str, int]:
        """Id of each non-special token that is split off from text, by name."""
        added = self._known(added_tokens(self.tokenizer))
        return {name: i for name, i in added.items() if name not in self.special}

    def _known(self, names: Any) -> dict[str, int]:
        ids = {name: self.tokenizer.token_id(name) for name in names}
        return {name: i for name, i in ids.items() if i is not None}

    @cached_property
    def _package(self) -> Any:
        """`tokenizers` object that parses special tokens; None for other tokenizers."""
        base = self.tokenizer
        while not isinstance(base, HuggingFaceTokenizer | Gpt2Tokenizer):
            if not hasattr(base, "base"):
                return None
            base = base.base
        return base.reading(self.special)

    @cached_property
    def _other_ids(self) -> dict[int, int]:
        """Our id of each special token that the package numbers differently, by its id there."""
        made = {self._package.token_to_id(name): i for name, i in self.special.items()}
        return {there: here for there, here in made.items() if there != here}

    def encode(self, text: str, is_owned: np.ndarray | None, guarded: Mapping[str, int]) -> Tokens:
        """Tokenize a rendered conversation.

        Args:
            text: the text, L characters.
            is_owned: bool [L], characters that must not form a token of `guarded`; None: none.
            guarded: protected tokens by name.

        Raises:
            UserError: the tokenizer forms such a token anyway.
        """
        if self._package is None:
            return self._by_parts(text, is_owned, guarded)
        found = _run(self._package, text, self._other_ids)
        if is_owned is None or not _forged(found, is_owned, guarded).any():
            return found
        return self._renamed(text, is_owned, guarded)

    def _renamed(self, text: str, is_owned: np.ndarray, guarded: Mapping[str, int]) -> Tokens:
        """Tokenize with special tokens renamed, so that messages cannot form them."""
        names = tuple(sorted(guarded))
        taken = codes(text)
        starts = range(_PRIVATE.start, _PRIVATE.stop - len(names) - 2, len(names))
        first = next(i for i in starts if not ((taken >= i) & (taken < i + len(names))).any())
        package, ids = _with_other_names(self._package.to_str(), names, first)
        known = {**guarded, **self.ordinary}
        real = {made: known[name] for name, made in ids.items()}
        written = list(text)
        for start, _, name in _written(text, is_owned, guarded):
            written[start] = chr(first + names.index(name))
        text = "".join(written)
        cuts: list[int] = []
        while True:
            parts = [
                _run(package, text[start:end], real).shifted(start)
                for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)
            ]
            found = joined(parts)
            forged = _forged(found, is_owned, guarded)
            if not forged.any():
                return found
            new = {int(start) + 1 for start in found.starts[forged]} - set(cuts)
            if not new or new & set(map(int, found.ends[forged])):
                raise UserError(_unavoidable(found.ids[forged][0], guarded))
            cuts = sorted({*cuts, *new})

    def _by_parts(
        self, text: str, is_owned: np.ndarray | None, guarded: Mapping[str, int]
    ) -> Tokens:
        """Tokenize with a tokenizer that does not parse special tokens in text."""
        tokens = {**self.special, **guarded}
        if is_owned is None:
            is_owned = np.zeros(len(text), bool)
        parts, at = [], 0
        for start, end, name in [*_written(text, is_owned, tokens), (len(text), len(text), "")]:
            parts.append(self._plain(text[at:start], tokens).shifted(at))
            if name:
                parts.append(Tokens(*map(np.asarray, ([tokens[name]], [start], [end]))))
            at = end
        return joined(parts)

    def _plain(self, text: str, tokens: Mapping[str, int]) -> Tokens:
        """Tokenize text that must not contain special tokens, splitting names if necessary."""
        found = self.tokenizer.encode(text)
        if np.isin(found, list(tokens.values())).any() and (name := longest_of(tokens)):
            cuts = [match.start() + 1 for match in name.finditer(text)]
            pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
            each = [self.tokenizer.encode(piece) for piece in pieces]
            if np.isin(np.concatenate(each), list(tokens.values())).any():
                raise UserError(
                    _unavoidable(found[np.isin(found, list(tokens.values()))][0], tokens)
                )
            places = zip([0, *cuts], pieces, each, strict=True)
            return joined(
                [_located(self.tokenizer, part, ids).shifted(at) for at, part, ids in places]
            )
        return _located(self.tokenizer, text, found)


def _run(package: Any, text: str, ids: Mapping[int, int]) -> Tokens:
    """Tokenize with a `tokenizers` object, and map ids by `ids`."""
    with package_errors(_UNUSABLE):
        encoding = package.encode(text, add_special_tokens=False)
    found = [ids.get(i, i) for i in encoding.ids] if ids else encoding.ids
    return _tokens(np.asarray(found, np.int32), encoding.offsets, len(text))


def _tokens(ids: np.ndarray, places: Sequence[tuple[int, int]], length: int) -> Tokens:
    """Return tokens from character spans in a text of `length`.

    A token without characters, such as a non-final byte of a character, joins the next one.
    """
    starts, ends = np.asarray(places, np.int32).reshape(-1, 2).T
    return Tokens(ids, starts, np.maximum(ends, np.minimum(starts + 1, length)))


def _forged(found: Tokens, is_owned: np.ndarray, guarded: Mapping[str, int]) -> np.ndarray:
    """Return which tokens are guarded tokens formed from owned characters, bool."""
    before = np.concatenate([[0], np.cumsum(is_owned)])
    touches = before[found.ends] > before[found.starts]
    return touches & np.isin(found.ids, list(guarded.values()))


def _written(
    text: str, is_owned: np.ndarray, tokens: Mapping[str, int]
) -> list[tuple[int, int, str]]:
    """Return (start, end, name) of token names in the text that have no owned character."""
    names = longest_of(tokens)
    outline = codes(text).copy()
    outline[is_owned] = _PRIVATE.stop - 1
    text = outline.tobytes().decode("utf-32-le")
    return [(*found.span(), found[0]) for found in names.finditer(text)] if names else []


@lru_cache(maxsize=4)
def _with_other_names(
    definition: str, names: tuple[str, ...], first: int
) -> tuple[Any, dict[str, int]]:
    """Return a tokenizer in which token names start with another character, and ids by name."""
    import tokenizers

    about = json.loads(definition)
    flags = {token["content"]: token for token in about["added_tokens"]}
    about["added_tokens"] = [t for t in about["added_tokens"] if t["content"] not in names]
    with package_errors(_UNUSABLE):
        package: Any = tokenizers.Tokenizer.from_str(json.dumps(about))
        new = {}
        for number, name in enumerate(names):
            of_file = flags.get(name, {})
            new[name] = tokenizers.AddedToken(
                chr(first + number) + name[1:],
                normalized=False,
                special=True,
                **{flag: of_file.get(flag, False) for flag in ("lstrip", "rstrip", "single_word")},
            )
        package.add_tokens(list(new.values()))
        made = {name: token.content for name, token in new.items()}
        made |= {token["content"]: token["content"] for token in about["added_tokens"]}
        ids: dict[str, int] = {name: package.token_to_id(text) for name, text in made.items()}
        return package, ids


def _located(tokenizer: Tokenizer, text: str, ids: np.ndarray) -> Tokens:
    """Return tokens with the character spans they stand for."""
    match tokenizer:
        case ByteTokenizer():
            first_bytes = (np.frombuffer(text.encode(), np.uint8) & 0xC0) != 0x80
            at = np.cumsum(first_bytes) - 1
            return Tokens(ids, at, at + 1)
        case CharTokenizer():
            return Tokens(ids, np.arange(len(text)), np.arange(len(text)) + 1)
        case WordTokenizer():
            return _tokens(ids, [w.span() for w in re.finditer(r"[^\s]+|\n", text)], len(text))
        case SentencePieceTokenizer():
            for parts in ([text], re.split(f"({SPACE_MARK})", text)):
                found = joined(list(_of_pieces(tokenizer, parts)))
                if np.array_equal(found.ids, ids):
                    return found
    if hasattr(tokenizer, "base"):
        return _located(tokenizer.base, text, ids)
    return _by_decoding(tokenizer, text, ids)


def _of_pieces(tokenizer: SentencePieceTokenizer, parts: Sequence[str]) -> Iterator[Tokens]:
    """Yield the tokens of text parts; a part "▁" is encoded as bytes."""
    at = 0
    for part in parts:
        if part == SPACE_MARK:
            ids = tokenizer.encode(part)
            yield Tokens(ids, np.full(len(ids), at), np.full(len(ids), at + 1))
        else:
            found = _sentencepiece(tokenizer.model).encode(part, return_type="offset_mapping")
            ids = np.asarray(found["ids"], np.int32)
            yield _tokens(ids, found["offsets"], len(part)).shifted(at)
        at += len(part)


def _by_decoding(tokenizer: Tokenizer, text: str, ids: np.ndarray) -> Tokens:
    """Return tokens with character spans, found by decoding one more token at a time.

    An incomplete character decodes to U+FFFD for each of its bytes.
    """
    texts = [tokenizer.decode(ids[:n]).rstrip("\ufffd") for n in range(len(ids))]
    lengths = [*map(len, texts), len(text)]
    borders = np.minimum(np.maximum.accumulate(lengths), len(text))
    return _tokens(ids, list(pairwise(borders.tolist())), len(text))


def _unavoidable(token: int, tokens: Mapping[str, int]) -> str:
    name = next(name for name, i in tokens.items() if i == token)
    return f"a message contains {name!r}, which this tokenizer parses as a token in any text"
