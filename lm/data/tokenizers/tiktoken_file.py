"""Vocabulary files of tiktoken, as used by Llama 3: base64 bytes and a rank per line."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from typing import Any

from lm.data.tokenizers.byte_level import LLAMA3_WORDS
from lm.data.tokenizers.hf import BYTE_CHARACTERS, package_errors
from lm.errors import UserError, missing_package

_FIRST_LINE = re.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\r?(\n|\Z)")
# Ids after the ranks, in Llama 3 (Llama Team 2024).
_NAMED = (
    *("<|begin_of_text|>", "<|end_of_text|>"),
    *("<|reserved_special_token_0|>", "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>"),
    *("<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
)
LLAMA3_TOKENS = (*_NAMED, *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)))


def is_tiktoken(content: bytes) -> bool:
    """Return whether a file is in tiktoken's format."""
    return _FIRST_LINE.match(content) is not None


def tiktoken_definition(content: bytes, special: Sequence[str]) -> bytes:
    """Convert a tiktoken file to a tokenizer.json that prepends the first special token.

    Special tokens get the ids after the ranks. The merges of a token are its splits into two
    tokens, ordered by the tokens' ranks, as in transformers.

    Raises:
        UserError: a line is damaged, or ranks are missing.
    """
    try:
        import tokenizers as package
    except ImportError as error:
        raise missing_package("this tokenizer", "tokenizers", "hf") from error
    ranks = _ranks(content)
    merges: list[tuple[int, int, int]] = []  # rank of the whole, of the left and of the right part
    for token, rank in ranks.items():
        for at in range(1, len(token)):
            left, right = ranks.get(token[:at]), ranks.get(token[at:])
            if left is not None and right is not None:
                merges.append((rank, left, right))
    names = ["".join(BYTE_CHARACTERS[byte] for byte in token) for token in ranks]
    pairs = [(names[left], names[right]) for _, left, right in sorted(merges)]
    ids: dict[str, int] = {name: i for i, name in enumerate(names)}
    with package_errors("not a tiktoken file"):
        made: Any = package.Tokenizer(package.models.BPE(ids, pairs, ignore_merges=True))
        words = package.pre_tokenizers.Split(package.Regex(LLAMA3_WORDS), "isolated")
        letters = package.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = package.pre_tokenizers.Sequence([words, letters])
        made.decoder = package.decoders.ByteLevel()
        tokens = [package.AddedToken(name, normalized=False, special=True) for name in special]
        made.add_special_tokens(tokens)
        bos = special[0]
        made.post_processor = package.processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, made.token_to_id(bos))],
        )
        return made.to_str().encode()


def _ranks(content: bytes) -> dict[bytes, int]:
    """Parse tokens and their ranks, which count from 0."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        text, _, rank = line.partition(b" ")
        try:
            token = base64.b64decode(text, validate=True)
        except binascii.Error as error:
            raise UserError(f"line {number} is not valid base64 ({error})") from error
        if rank.strip() != str(len(ranks)).encode() or not token or token in ranks:
            raise UserError(f"line {number} is not a new token with the rank {len(ranks)}")
        ranks[token] = len(ranks)
    if missing := next((byte for byte in range(256) if bytes([byte]) not in ranks), None):
        raise UserError(f"no token for the byte {missing}")
    return ranks
