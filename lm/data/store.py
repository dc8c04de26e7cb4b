"""The token store: a corpus tokenised once, on disk, read by random access."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lm.data.text.corpus import Corpus
from lm.data.tokenization import tokenize
from lm.data.tokenizers.tokenizer import Tokenizer
from lm.errors import UserError
from lm.storage import DamagedFolder, open_or_build, write_durably

_FORMAT = 3


@dataclass(frozen=True)
class Manifest:
    """What a store was made of, and its sizes; n_bytes counts the text as UTF-8, n_words what is
    between white space.

    `delimiter` is the token that both starts and ends documents, if the tokenizer has one.
    """

    format: int
    source: str
    source_digest: str
    tokenizer_digest: str
    dtype: str
    n_tokens: int
    n_documents: int
    n_bytes: int
    n_characters: int
    n_words: int
    delimiter: int | None


@dataclass(frozen=True, eq=False)
class TokenStore:
    """The tokens of a corpus, one document after the other.

    tokens: [n_tokens] uint16 or uint32, memory-mapped.
    offsets: [n_documents + 1] int64; document i lies in tokens[offsets[i]:offsets[i + 1]]. If one
        id both starts and ends documents, that id once more follows the last document.
    """

    directory: Path
    manifest: Manifest
    tokens: np.ndarray
    offsets: np.ndarray

    @property
    def n_tokens(self) -> int:
        return self.manifest.n_tokens


def build_store(
    corpus: Corpus,
    tokenizer: Tokenizer,
    cache_directory: str | Path,
    workers: int = 0,
    progress: bool = False,
) -> TokenStore:
    """Opens the store of a corpus under a tokenizer, tokenising it first if it is not there.

    workers: number of processes, 0 for one a core; the tokens do not depend on it. A progress bar
    goes to stderr. UserError for text that cannot be read or encoded, and for a full disk.
    """
    recipe = json.dumps([_FORMAT, tokenizer.digest, corpus.digest])
    key = hashlib.sha256(recipe.encode()).hexdigest()[:32]
    return open_or_build(
        Path(cache_directory) / "stores" / key,
        _open,
        lambda folder: _write(folder, corpus, tokenizer, workers, progress),
    )


def _write(
    folder: Path, corpus: Corpus, tokenizer: Tokenizer, workers: int, progress: bool
) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    n_tokens = n_documents = n_bytes = n_characters = n_words = 0
    bar = tqdm(
        desc=f"tokenising {corpus.name}",
        total=corpus.size,
        unit="B",
        unit_scale=True,
        disable=not progress,
    )
    with open(folder / "tokens.bin", "wb") as tokens, open(folder / "offsets.bin", "wb") as offsets:
        with bar:
            for block in tokenize(corpus.chunks(), tokenizer, dtype, workers):
                tokens.write(block.tokens.tobytes())
                offsets.write((block.starts + n_tokens).tobytes())
                n_tokens += len(block.tokens)
                n_documents += len(block.starts)
                n_bytes += block.n_bytes
                n_characters += block.n_characters
                n_words += block.n_words
                bar.update(block.n_bytes)
        if n_tokens == 0:
            raise UserError(f"{corpus.name} holds no tokens")
        offsets.write(np.int64(n_tokens).tobytes())
        if tokenizer.bos_id is not None and tokenizer.bos_id == tokenizer.eos_id:
            tokens.write(np.asarray([tokenizer.bos_id], dtype).tobytes())
            n_tokens += 1
        for file in (tokens, offsets):
            file.flush()
            os.fsync(file.fileno())
    manifest = Manifest(
        format=_FORMAT,
        source=corpus.name,
        source_digest=corpus.digest,
        tokenizer_digest=tokenizer.digest,
        dtype=dtype.name,
        n_tokens=n_tokens,
        n_documents=n_documents,
        n_bytes=n_bytes,
        n_characters=n_characters,
        n_words=n_words,
        delimiter=tokenizer.bos_id if tokenizer.bos_id == tokenizer.eos_id else None,
    )
    write_durably(folder / "manifest.json", json.dumps(asdict(manifest), indent=2).encode())


def _open(folder: Path) -> TokenStore:
    try:
        manifest = Manifest(**json.loads((folder / "manifest.json").read_bytes()))
        tokens = map_array(folder / "tokens.bin", manifest.dtype, manifest.n_tokens)
        offsets = map_array(folder / "offsets.bin", "int64", manifest.n_documents + 1)
    except (OSError, ValueError, TypeError) as error:
        raise DamagedFolder(f"{type(error).__name__}: {error}") from error
    return TokenStore(folder, manifest, tokens, offsets)


def map_array(path: Path, dtype: str, length: int) -> np.ndarray:
    """A file of `length` numbers as an array, memory-mapped; Damaged if it has another size."""
    expected = length * np.dtype(dtype).itemsize
    if path.stat().st_size != expected:
        raise DamagedFolder(f"{path.name} has {path.stat().st_size} bytes instead of {expected}")
    # As a plain array: slicing a np.memmap costs several times as much.
    return np.memmap(path, dtype, mode="r").view(np.ndarray)
