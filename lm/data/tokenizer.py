"""Tokenizer interface: saving, loading, and opening the tokenizer of a configuration.

`--config.data.tokenizer` is NAME or NAME:ARGUMENT, where NAME is a `Tokenizer` class in the
registry TOKENIZERS. NAME:ARGUMENT opens a file (`from_argument`); NAME alone is fitted to the
training text (`is_fitted`, `fit`), or needs neither.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from lm.config.registries import CONVERSATIONS, TOKENIZERS
from lm.config.rules import spec_problem
from lm.data.sources import Corpus
from lm.errors import UserError
from lm.storage import DamagedFolder, cache_directory, open_or_build, read_json

MOST_TO_FIT = 2**30  # bytes: some tokenizers are fitted to a sample of larger corpora


@dataclass(frozen=True)
class Template:
    """Token ids that a tokenizer adds around a text.

    Attributes:
        before: ids before the text.
        after: ids after the text of an encoder input.
        between: ids between the two texts of an encoder pair; (): one separator.
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    between: tuple[int, ...] = ()


class Tokenizer(ABC):
    """Mapping between text and token ids; an immutable value fully described by its `files`.

    Worker processes receive it pickled.

    Attributes:
        kind: name in the registry, by which a saved tokenizer is opened.
        is_fitted: whether NAME alone is fitted to the training text.
        fits_sample: whether a sample of a large corpus suffices for fitting.
        states_template: whether `template` comes from a model folder.
        forms: configuration values, such as ("words", "words:FILE"), for messages and validation;
            () for any. Only for plug-ins: the registry has those of library tokenizers.
    """

    kind: ClassVar[str]
    is_fitted: ClassVar[bool] = False
    fits_sample: ClassVar[bool] = False
    states_template: ClassVar[bool] = False
    forms: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_argument(cls, argument: str, data: Any) -> Tokenizer:
        """Open the tokenizer of NAME:ARGUMENT.

        Args:
            argument: text after "NAME:", such as a path for `files.find_file`.
            data: section `data` of the configuration.

        Raises:
            UserError: the tokenizer does not exist, or is damaged.
        """
        raise NotImplementedError

    @classmethod
    def fit_settings(cls, data: Any) -> dict[str, Any]:
        """Return the keyword arguments of `fit` from section `data` of the configuration.

        They are part of the digest under which a fitted tokenizer is cached.
        """
        return {}

    @classmethod
    def fit(cls, texts: Iterable[str], **settings: Any) -> Self:
        """Fit a tokenizer to texts."""
        raise NotImplementedError

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, including special tokens."""

    @property
    def bos_id(self) -> int | None:
        """Id that starts a document; None if there is none."""
        return None

    @property
    def eos_id(self) -> int | None:
        """Id that ends a document; it delimits documents if it equals `bos_id`."""
        return None

    @property
    def n_text_ids(self) -> int:
        """Upper bound (exclusive) of ids that `encode` or `template` can return."""
        return self.vocab_size

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that each end a generated text."""
        return () if self.eos_id is None else (self.eos_id,)

    @property
    def template(self) -> Template:
        """Ids around a text: bos before it, unless a model folder specifies others."""
        return Template(() if self.bos_id is None else (self.bos_id,))

    def role_id(self, role: str) -> int | None:
        """Return the id that a model folder specifies for pad, cls, sep, mask or decoder_start."""
        return None

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Tokenize a text to int32 ids [n], without bos, eos or other special ids."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Tokenize several texts; may be faster than `encode`."""
        return [self.encode(text) for text in texts]

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids to text; drops bos and eos if the reference implementation does."""

    def token_id(self, name: str) -> int | None:
        """Return the id of a vocabulary entry such as "[MASK]", or None."""
        return None

    def pieces(self) -> list[str]:
        """Return vocabulary entries by id, with their markers (##, ▁, Ġ)."""
        return [self.decode([i]) for i in range(self.vocab_size)]

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """Return names and contents of the files that describe the tokenizer."""

    @classmethod
    @abstractmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Self:
        """Restore the tokenizer from `files()`."""

    @cached_property
    def digest(self) -> str:
        """sha256 of kind and files."""
        return _digest(self.kind, self.files())

    def save(self, directory: str | Path) -> None:
        """Write a self-contained copy for `load_saved_tokenizer`."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        files = self.files()
        for name, content in files.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content)
        about = {"kind": self.kind, "files": sorted(files), "digest": self.digest}
        (directory / "about.json").write_text(json.dumps(about, indent=2) + "\n")


def load_saved_tokenizer(directory: str | Path) -> Tokenizer:
    """Load a tokenizer written by `Tokenizer.save`.

    Raises:
        UserError: there is none, or its files were modified.
    """
    try:
        return _read(Path(directory))
    except DamagedFolder as damage:
        raise UserError(f"no intact tokenizer in {directory} ({damage})") from damage


def check_vocabulary(tokenizer: Tokenizer, n_rows: int) -> None:
    """Raise UserError if texts may have ids beyond the token table of a model.

    Args:
        tokenizer: tokenizer of the texts.
        n_rows: `--config.model.vocab_size`.
    """
    if tokenizer.n_text_ids > n_rows:
        raise UserError(
            f"--config.model.vocab_size={n_rows} is smaller than the tokenizer's "
            f"{tokenizer.n_text_ids}: this tokenizer does not belong to this model"
        )


def is_fitted(spec: str) -> bool:
    """Return whether `--config.data.tokenizer` is fitted to the training text."""
    return spec in TOKENIZERS and TOKENIZERS[spec].is_fitted


def make_tokenizer(
    data: Any, training: Iterable[Corpus], columns: Collection[str] = ()
) -> Tokenizer:
    """Open or fit the tokenizer of `data.tokenizer`.

    A fitted tokenizer is cached under a digest of its settings and the training text.

    Args:
        data: section `data` of the configuration.
        training: training text.
        columns: record columns that are read.

    Raises:
        UserError: the name is unknown, or a file is missing or damaged.
    """
    if problem := spec_problem(TOKENIZERS, data.tokenizer):
        raise UserError(problem)
    name, _, argument = data.tokenizer.partition(":")
    cls = TOKENIZERS[name]
    if argument:
        try:
            tokenizer: Tokenizer = cls.from_argument(argument, data)
            tokenizer.vocab_size  # noqa: B018  # reads the file, so that errors name it
        except UserError as error:
            raise UserError(f"{data.tokenizer}: {error}") from error
    else:
        tokenizer = _fitted(cls, data, tuple(training)) if cls.is_fitted else cls()
    is_spoken = not CONVERSATIONS.isdisjoint(columns)
    if data.added_tokens or data.chat_template or is_spoken:
        from lm.data.chat.added_tokens import OF_TEMPLATE, extended

        return extended(tokenizer, data, OF_TEMPLATE if is_spoken else "")
    return tokenizer


def _fitted(cls: type[Tokenizer], data: Any, training: tuple[Corpus, ...]) -> Tokenizer:
    settings = cls.fit_settings(data)
    recipe = ["v2", cls.kind, settings, *(corpus.digest for corpus in training)]
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:32]

    def build(folder: Path) -> None:
        texts: Iterable[str] = (c.text for corpus in training for c in corpus.chunks())
        if cls.fits_sample and sum(corpus.size or 0 for corpus in training) > MOST_TO_FIT:
            from lm.data.fit_sample import read_sample

            texts = read_sample(training, MOST_TO_FIT, folder)
        cls.fit(texts, **settings).save(folder)

    return open_or_build(cache_directory(data) / "tokenizers" / key, _read, build)


def _read(folder: Path) -> Tokenizer:
    try:
        about = read_json(folder / "about.json")
        kind, names = about.get("kind"), about.get("files")
        if not isinstance(kind, str) or kind not in TOKENIZERS:
            raise DamagedFolder("about.json does not name a tokenizer kind")
        if not isinstance(names, list) or not all(_is_file_inside(folder, name) for name in names):
            raise DamagedFolder("about.json names a missing file")
        files = {name: (folder / name).read_bytes() for name in names}
        if _digest(kind, files) != about.get("digest"):
            raise DamagedFolder("its files were modified after saving")
        return TOKENIZERS[kind].from_files(files)
    except (OSError, UserError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise DamagedFolder(str(what)) from error


def _is_file_inside(folder: Path, name: Any) -> bool:
    inside = isinstance(name, str) and not Path(name).is_absolute() and ".." not in Path(name).parts
    return inside and (folder / name).is_file()


def _digest(kind: str, files: Mapping[str, bytes]) -> str:
    total = hashlib.sha256(kind.encode())
    for name, content in sorted(files.items()):
        total.update(name.encode() + hashlib.sha256(content).digest())
    return total.hexdigest()
