"""Tokenizers `tokenizers` (tokenizer.json files) and `gpt2` (GPT-2's two files)."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np

from lm.data.files import find_file
from lm.data.tokenizer import Template, Tokenizer
from lm.data.tokenizers.byte_level import TiktokenEncoder, tiktoken_encoder
from lm.errors import UserError, missing_package
from lm.storage import parse_json

_BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "[CLS]", "<|endoftext|>")
_EOS_NAMES = ("</s>", "<eos>", "<|end_of_text|>", "[SEP]", "<|endoftext|>")


def _package() -> Any:
    # The cores are already shared by processes. The package reads this at each call.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import tokenizers
    except ImportError as error:
        raise missing_package("this tokenizer", "tokenizers", "hf") from error
    return tokenizers


@contextmanager
def package_errors(what: str) -> Iterator[None]:
    """Convert exceptions of the package, including Rust panics, to UserError.

    Args:
        what: start of the message.
    """
    try:
        yield
    except BaseException as error:
        # A panic derives from BaseException, so that it is not caught by accident.
        is_of_package = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if isinstance(error, UserError) or not is_of_package:
            raise
        raise UserError(f"{what} ({error})") from error


_MANY = 2**19  # characters from which preparing the fast encoder pays off
_UNUSABLE = "the tokenizer cannot be used"


class _HuggingFace(Tokenizer):
    """Base class of both kinds, which build `_tokenizer` from different files."""

    @property
    @abstractmethod
    def _tokenizer(self) -> Any: ...

    @cached_property
    def vocab_size(self) -> int:  # type: ignore[override]
        # The largest id, not the number of entries: ids may have gaps.
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def n_text_ids(self) -> int:  # type: ignore[override]
        added = self._tokenizer.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special}
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        around = (*self.template.before, *self.template.after)
        return max((i for i in ids if i not in special or i in around), default=-1) + 1

    @cached_property
    def bos_id(self) -> int | None:  # type: ignore[override]
        return self._first(_BOS_NAMES)

    @cached_property
    def eos_id(self) -> int | None:  # type: ignore[override]
        return self._first(_EOS_NAMES)

    def _first(self, names: Iterable[str]) -> int | None:
        found = (self.token_id(name) for name in names)
        return next((i for i in found if i is not None), None)

    def encode(self, text: str) -> np.ndarray:
        with package_errors(_UNUSABLE):
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return np.asarray(ids, np.int32)

    @cached_property
    def _fast(self) -> TiktokenEncoder | None:
        return tiktoken_encoder(self._tokenizer, BYTE_CHARACTERS)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        with package_errors(_UNUSABLE):
            if sum(map(len, texts)) >= _MANY and self._fast:
                return self._fast.encode_batch(texts)
            found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in found]

    def reading(self, names: Iterable[str]) -> Any:
        """Return the package's tokenizer, extended to parse tokens of these names in text."""
        package = _package()
        with package_errors(_UNUSABLE):
            found = package.Tokenizer.from_str(self._tokenizer.to_str())
            known = {token.content for token in found.get_added_tokens_decoder().values()}
            new = [name for name in names if name not in known]
            found.add_special_tokens([package.AddedToken(name, normalized=False) for name in new])
        return found

    def decode(self, ids: Iterable[int]) -> str:
        with package_errors(_UNUSABLE):
            return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_id(self, name: str) -> int | None:
        return self._tokenizer.token_to_id(name)

    def pieces(self) -> list[str]:
        return [self._tokenizer.id_to_token(i) or "" for i in range(self.vocab_size)]


@dataclass(frozen=True)
class HuggingFaceTokenizer(_HuggingFace):
    """Tokenizer of a tokenizer.json file."""

    definition: bytes = field(repr=False)
    kind: ClassVar[str] = "tokenizers"

    @classmethod
    def from_argument(cls, argument: str, data: Any) -> Self:
        return cls(find_file(argument, data).read_bytes())

    def __reduce__(self) -> tuple:
        return type(self), (self.definition,)

    @cached_property
    def _tokenizer(self) -> Any:
        package = _package()
        with package_errors("not a tokenizers JSON file"):
            tokenizer = package.Tokenizer.from_buffer(self.definition)
            tokenizer.no_truncation()
            tokenizer.no_padding()
            tokenizer.encode_special_tokens = True
        return tokenizer

    @cached_property
    def post_processor_template(self) -> Template:
        """Ids that the file's post-processor adds around a text."""
        for text in ("a", "0", ".", "\u4e00"):  # a vocabulary may lack some of them
            with package_errors(_UNUSABLE):
                found = self._tokenizer.encode(text)
                pair = self._tokenizer.encode(text, text)
            inside = [at for at, part in enumerate(found.sequence_ids) if part is not None]
            parts = pair.sequence_ids
            if inside and 0 in parts and 1 in parts:
                ids = tuple(found.ids)
                start = len(parts) - parts[::-1].index(0)
                between = tuple(pair.ids)[start : parts.index(1)]
                return Template(ids[: inside[0]], ids[inside[-1] + 1 :], between)
        return Template()

    @property
    def added_tokens(self) -> dict[str, bool]:
        """Tokens at which a text is cut before the model of the file sees it; True if special."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: token.special for token in added.values()}

    def with_added_tokens(self, tokens: Iterable[Mapping[str, Any]]) -> bytes:
        """Return the file with tokens added: their `content` and flags of AddedToken."""
        package = _package()
        with package_errors(_UNUSABLE):
            extended = package.Tokenizer.from_buffer(self.definition)
            extended.add_tokens([package.AddedToken(**token) for token in tokens])
            return extended.to_str().encode()

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self.definition}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Self:
        return cls(files["tokenizer.json"])


@dataclass(frozen=True)
class Gpt2Tokenizer(_HuggingFace):
    """GPT-2's byte-level BPE (Radford 2019, §2.2): contents of encoder.json and vocab.bpe."""

    encoder: bytes = field(repr=False)
    merges: bytes = field(repr=False)
    kind: ClassVar[str] = "gpt2"

    @classmethod
    def from_argument(cls, argument: str, data: Any) -> Self:
        names = ("encoder.json", "vocab.bpe")
        return cls(*(find_file(f"{argument}/{name}", data).read_bytes() for name in names))

    def __reduce__(self) -> tuple:
        return type(self), (self.encoder, self.merges)

    @cached_property
    def _tokenizer(self) -> Any:
        package = _package()
        with package_errors("encoder.json and vocab.bpe are not a GPT-2 vocabulary"):
            vocabulary = parse_json(self.encoder, "encoder.json")
            pairs = read_merges(self.merges)
            tokenizer = package.Tokenizer(package.models.BPE(vocab=vocabulary, merges=pairs))
        tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = package.decoders.ByteLevel()
        return tokenizer

    def files(self) -> dict[str, bytes]:
        return {"encoder.json": self.encoder, "vocab.bpe": self.merges}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Self:
        return cls(files["encoder.json"], files["vocab.bpe"])


def read_merges(content: bytes) -> list[tuple[str, str]]:
    """Return the merges of a merges.txt or vocab.bpe, best first.

    Raises:
        UserError: the file is not UTF-8, or a line is not two pieces.
    """
    try:
        lines = content.decode("utf-8-sig").split("\n")  # pieces may hold other line separators
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 at byte {error.start}") from error
    merges = []
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise UserError(f"line {number} is not two pieces separated by a space")
        merges.append((left, right))
    return merges


def _byte_characters() -> list[str]:
    """Return GPT-2's character for every byte: Latin-1 if printable, else from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    free = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(free)) for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()
