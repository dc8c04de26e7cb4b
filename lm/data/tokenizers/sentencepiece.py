"""Tokenizer `sentencepiece`: existing models, and training of a lossless one."""

from __future__ import annotations

import heapq
import io
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from typing import Any, ClassVar, Self

import numpy as np
import sentencepiece

from lm.data.files import find_file
from lm.data.tokenizer import Tokenizer
from lm.errors import UserError

# SentencePiece uses this character for spaces, so a literal one must be encoded as bytes.
SPACE_MARK = "\u2581"
_STRETCH = 2_000  # characters per chunk: several lines, so that newlines are learned too
_BEFORE_SPACE = re.compile(r"[^ ](?= )")
_MOST_CHARACTERS = {"bpe": 20_000_000, "unigram": 4_000_000}  # so that training takes seconds


@dataclass(frozen=True)
class SentencePieceTokenizer(Tokenizer):
    """SentencePiece model (Kudo and Richardson 2018); `model` is the serialized proto."""

    model: bytes = field(repr=False)
    kind: ClassVar[str] = "sentencepiece"
    is_fitted: ClassVar[bool] = True
    fits_sample: ClassVar[bool] = True

    @classmethod
    def from_argument(cls, argument: str, data: Any) -> Self:
        return cls(find_file(argument, data).read_bytes())

    @classmethod
    def fit_settings(cls, data: Any) -> dict[str, Any]:
        return {"vocab_size": data.tokenizer_vocab_size, "lowercase": data.lowercase}

    @classmethod
    def fit(cls, texts: Iterable[str], **settings: Any) -> Self:
        return cls(train_sentencepiece(texts, **settings))

    def __reduce__(self) -> tuple:
        return type(self), (self.model,)

    @cached_property
    def _processor(self) -> sentencepiece.SentencePieceProcessor:
        try:
            return sentencepiece.SentencePieceProcessor(model_proto=self.model)
        except RuntimeError as error:
            raise UserError("not a SentencePiece model file") from error

    @cached_property
    def _space_mark_ids(self) -> np.ndarray | None:
        """Byte ids of a literal space mark; None if the model is not lossless."""
        processor = self._processor
        ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        probe = " a  b "
        lossless = "".join(processor.encode(probe, out_type=str)) == probe.replace(" ", SPACE_MARK)
        return np.asarray(ids, np.int32) if lossless and all(map(processor.is_byte, ids)) else None

    @cached_property
    def _ends_before_space(self) -> bool:
        """True if no piece has a space inside, so that texts can be split before spaces."""
        return not any(SPACE_MARK in piece.lstrip(SPACE_MARK) for piece in self.pieces())

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    @property
    def bos_id(self) -> int | None:
        return _present(self._processor.bos_id())

    @property
    def eos_id(self) -> int | None:
        return _present(self._processor.eos_id())

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        marks = [] if self._space_mark_ids is None else [self._space_mark_ids]
        parts = [text.split(SPACE_MARK) if marks else [text] for text in texts]
        stretches = [[self._cut(part) for part in of_text] for of_text in parts]
        flat = list(chain.from_iterable(chain.from_iterable(stretches)))
        ids = iter(self._processor.encode(flat, num_threads=1, return_type="numpy"))
        found = []
        for of_text in stretches:
            runs = ([*marks, *islice(ids, len(part))] for part in of_text)
            found.append(np.concatenate([*chain.from_iterable(runs)][len(marks) :]))
        return found

    def _cut(self, text: str) -> list[str]:
        """Split a text where that does not change its encoding; this halves the encoding time."""
        if self._space_mark_ids is None or not self._ends_before_space:
            return [text]
        stretches, start = [], 0
        while cut := _BEFORE_SPACE.search(text, start + _STRETCH):
            stretches.append(text[start : cut.end()])
            start = cut.end()
        return [*stretches, text[start:]]

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    def token_id(self, name: str) -> int | None:
        found = self._processor.piece_to_id(name)
        return found if self._processor.id_to_piece(found) == name else None

    def pieces(self) -> list[str]:
        return self._processor.id_to_piece(list(range(self.vocab_size)))

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.model": self.model}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Self:
        return cls(files["tokenizer.model"])


def _present(special_id: int) -> int | None:
    return special_id if special_id >= 0 else None


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, model_type: str = "bpe", lowercase: bool = False
) -> bytes:
    """Train a SentencePiece model.

    Except for `lowercase` the model is lossless: identity normalization, no dummy prefix, all
    whitespace kept, and byte fallback. Training is deterministic. A large text is subsampled with a
    seed: to 20 million characters, or 4 million for unigram.

    Args:
        texts: training text.
        vocab_size: number of pieces.
        model_type: "bpe" or "unigram".
        lowercase: fold case, and characters by NFKC.

    Returns:
        Serialized proto of the model.

    Raises:
        UserError: `vocab_size` is not possible for the text.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_sample(texts, _MOST_CHARACTERS[model_type])),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            character_coverage=0.9999,
            byte_fallback=True,
            normalization_rule_name="nfkc_cf" if lowercase else "identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * _STRETCH,
            num_threads=4,  # fixed: the unigram trainer's sums depend on it
            minloglevel=3,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].rpartition("] ")[2]
        raise UserError(
            f"a SentencePiece vocabulary of {vocab_size} pieces cannot be trained on this text: "
            f"change --config.data.tokenizer_vocab_size ({reason})"
        ) from error
    return model.getvalue()


def _sample(texts: Iterable[str], most: int, seed: int = 0) -> list[str]:
    """Draw a uniform sample of chunks of all texts, in order.

    Each chunk gets a random number; chunks with the largest ones are dropped until at most `most`
    characters remain.
    """
    rng = random.Random(seed)
    kept: list[tuple[float, int, str]] = []
    size = 0
    for place, stretch in enumerate(_stretches(texts)):
        heapq.heappush(kept, (-rng.random(), place, stretch))
        size += len(stretch)
        while size > most:
            size -= len(heapq.heappop(kept)[-1])
    return [stretch for _, _, stretch in sorted(kept, key=lambda item: item[1])]


def _stretches(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        text = text.replace(SPACE_MARK, "").replace("\0", "")
        yield from (text[at : at + _STRETCH] for at in range(0, len(text), _STRETCH))
