"""From a tokenizer named in the config, or saved in a run, to the tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lm.data.files import find_file
from lm.data.text.corpus import Corpus
from lm.data.tokenizers.characters import ByteTokenizer, CharTokenizer
from lm.data.tokenizers.hf import Gpt2Tokenizer, HuggingFaceTokenizer
from lm.data.tokenizers.sentencepiece import SentencePieceTokenizer, train_sentencepiece
from lm.data.tokenizers.tokenizer import Tokenizer
from lm.data.tokenizers.words import WordTokenizer
from lm.errors import UserError
from lm.storage import DamagedFolder, cache_directory, open_or_build, open_run_folder

__all__ = ["FITTED", "Tokenizer", "choose_tokenizer", "load_saved", "train_sentencepiece"]

_KINDS: dict[str, type[Tokenizer]] = {
    kind.kind: kind
    for kind in (
        ByteTokenizer,
        CharTokenizer,
        SentencePieceTokenizer,
        HuggingFaceTokenizer,
        Gpt2Tokenizer,
        WordTokenizer,
    )
}
_FIT: dict[str, Callable[..., Tokenizer]] = {
    "char": CharTokenizer.fit,
    "sentencepiece": lambda texts, vocab_size: SentencePieceTokenizer(
        train_sentencepiece(texts, vocab_size)
    ),
    "words": WordTokenizer.fit,
}
FITTED = tuple(_FIT)  # what `data.tokenizer` names without a file


def load_saved(directory: str | Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote; UserError if there is none or it was changed."""
    try:
        return _read(Path(directory))
    except DamagedFolder as damage:
        raise UserError(f"no intact tokenizer in {directory} ({damage})") from damage


def choose_tokenizer(data: Any, training: Iterable[Corpus]) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names; the `FITTED` ones fit the training text.

    A fitted tokenizer is kept in the cache, under the digest of what it was fitted to. UserError
    for an unknown name, or a file that is missing or not what it should be.
    """
    kind, _, path = data.tokenizer.partition(":")
    match kind, bool(path):
        case "byte", False:
            return ByteTokenizer()
        case _, False if kind in FITTED:
            return _fitted(kind, data, tuple(training))
        case "run", True:
            return load_saved(open_run_folder(path) / "tokenizer")
        case "words", True:
            return _word_list(path, data)
        case "sentencepiece", True:
            return _checked(SentencePieceTokenizer(_content(path, data)), data)
        case "tokenizers", True:
            return _checked(HuggingFaceTokenizer(_content(path, data)), data)
        case "gpt2", True:
            parts = (_content(f"{path}/{name}", data) for name in ("encoder.json", "vocab.bpe"))
            return _checked(Gpt2Tokenizer(*parts), data)
    known = (
        "byte, char, words, words:FILE, sentencepiece, sentencepiece:FILE.model, "
        "tokenizers:FILE.json, gpt2:DIR"
    )
    raise UserError(f"unknown tokenizer {data.tokenizer!r} (known: {known})")


def _content(path: str, data: Any) -> bytes:
    return find_file(path, data).read_bytes()


def _checked(tokenizer: Tokenizer, data: Any) -> Tokenizer:
    """Loads the vocabulary now, so that a wrong file is reported with its name."""
    try:
        tokenizer.vocab_size  # noqa: B018
    except UserError as error:
        raise UserError(f"{data.tokenizer}: {error}") from error
    return tokenizer


def _word_list(path: str, data: Any) -> Tokenizer:
    try:
        return WordTokenizer.from_list(_content(path, data), data.lowercase)
    except UserError as error:
        raise UserError(f"{data.tokenizer}: {error}") from error


def _fitted(kind: str, data: Any, training: tuple[Corpus, ...]) -> Tokenizer:
    settings: dict[str, Any] = {}
    if kind != "char":
        settings["vocab_size"] = data.tokenizer_vocab_size
    if kind == "words":
        settings |= {"min_count": data.tokenizer_min_count, "lowercase": data.lowercase}
    recipe = ["v2", kind, settings, *(corpus.digest for corpus in training)]
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:32]

    def build(folder: Path) -> None:
        _FIT[kind](_texts(training), **settings).save(folder)

    return open_or_build(cache_directory(data) / "tokenizers" / key, _read, build)


def _texts(corpora: Iterable[Corpus]) -> Iterator[str]:
    return (piece.text for corpus in corpora for piece in corpus.chunks())


def _read(folder: Path) -> Tokenizer:
    try:
        about = json.loads((folder / "about.json").read_bytes())
        files = {name: (folder / name).read_bytes() for name in about["files"]}
        tokenizer = _KINDS[about["kind"]].from_files(files)
    except (OSError, ValueError, KeyError) as error:
        raise DamagedFolder(f"{type(error).__name__}: {error}") from error
    if tokenizer.digest != about["digest"]:
        raise DamagedFolder("its files are not those that were saved")
    return tokenizer
