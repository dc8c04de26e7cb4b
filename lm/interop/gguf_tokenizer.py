"""Tokenizers in GGUF: byte-level BPE with merges, and SentencePiece models with scores.

llama.cpp splits words by built-in expressions (`tokenizer.ggml.pre`), encodes a SentencePiece BPE
model by its scores, and writes unknown text as bytes. Tokenizers that it cannot reproduce exactly
are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm.data.chat.extended_tokenizer import ExtendedTokenizer
from lm.data.tokenizer import Tokenizer
from lm.data.tokenizers.byte_level import GPT2_WORDS, LLAMA3_WORDS, QWEN_WORDS, word_pattern
from lm.data.tokenizers.folder import FolderTokenizer
from lm.data.tokenizers.hf import Gpt2Tokenizer, HuggingFaceTokenizer
from lm.data.tokenizers.sentencepiece import SentencePieceTokenizer
from lm.errors import UserError
from lm.runs.checkpoints import Log

# llama.cpp's names (src/llama-vocab.cpp) for the expressions that split a text into words.
_WORDS = {GPT2_WORDS: "gpt-2", LLAMA3_WORDS: "llama-bpe", QWEN_WORDS: "qwen2"}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = range(1, 6)  # gguf.TokenType
_ADDED_SCORE = -1000.0  # as in llama.cpp's own conversion
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType of SentencePiece


def write_gguf_tokenizer(writer: Any, tokenizer: Tokenizer | None, n_rows: int, log: Log) -> None:
    """Write a tokenizer to a GGUF file.

    Args:
        writer: gguf.GGUFWriter.
        tokenizer: tokenizer of the run, or None.
        n_rows: rows of the token table; ids beyond the tokenizer's are unused.
        log: receives the lines for the user.

    Raises:
        UserError: llama.cpp would encode texts differently.
    """
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    base = tokenizer
    names: tuple[str, ...] = ()
    if isinstance(tokenizer, ExtendedTokenizer):
        base, names = tokenizer.base, tokenizer.names
    vocabulary = base.base if isinstance(base, FolderTokenizer) else base
    added = base.added_tokens if isinstance(base, FolderTokenizer) else {}
    added = added | dict.fromkeys(names, True)
    match vocabulary:
        case HuggingFaceTokenizer():
            tokens, types = _write_byte_level(writer, json.loads(vocabulary.definition))
            scores = None
        case Gpt2Tokenizer():
            definition = json.loads(vocabulary._tokenizer.to_str())
            tokens, types = _write_byte_level(writer, definition)
            scores = None
        case SentencePieceTokenizer():
            tokens, types, scores = _write_sentencepiece(writer, vocabulary, log)
        case _:
            raise UserError(
                f"GGUF does not support a {vocabulary.kind} tokenizer, only byte-level BPE and "
                "SentencePiece"
            )
    size = max(n_rows, len(tokens))
    tokens += [f"[PAD{i}]" for i in range(len(tokens), size)]
    types += [_UNUSED] * (size - len(types))
    for name, is_special in added.items():
        i = tokenizer.token_id(name)
        if i is not None and i < size:
            tokens[i], types[i] = name, _CONTROL if is_special else _USER_DEFINED
    writer.add_token_list(tokens[:n_rows])
    writer.add_token_types(types[:n_rows])
    if scores is not None:
        writer.add_token_scores((scores + [_ADDED_SCORE] * size)[:n_rows])
    _write_special(writer, tokenizer, n_rows)


def _write_special(writer: Any, tokenizer: Tokenizer, n_rows: int) -> None:
    """Write special ids, whether texts start or end with them, and the chat template."""
    ends = [i for i in tokenizer.stop_ids if i != tokenizer.eos_id]
    roles: Mapping[Callable[[int], None], int | None] = {
        writer.add_bos_token_id: tokenizer.bos_id,
        writer.add_eos_token_id: tokenizer.eos_id,
        writer.add_eot_token_id: ends[0] if ends else None,
        writer.add_unk_token_id: tokenizer.role_id("unk"),
        writer.add_pad_token_id: tokenizer.role_id("pad"),
    }
    for write, i in roles.items():
        if i is not None and i < n_rows:
            write(i)
    before = tokenizer.template.before
    if before not in ((), (tokenizer.bos_id,)):
        raise UserError("GGUF puts only bos before a text, but this tokenizer other tokens")
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(False)
    template = getattr(tokenizer, "chat_templates", {}).get("default")
    if template:
        writer.add_chat_template(template)


def _write_byte_level(writer: Any, definition: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Write the byte-level BPE of a tokenizer.json; return its tokens and their types."""
    model, words = definition["model"], word_pattern(definition["pre_tokenizer"])
    normalizer = (definition.get("normalizer") or {}).get("type")
    if model["type"] != "BPE" or words not in _WORDS or normalizer not in (None, "NFC"):
        raise UserError(
            "GGUF supports the tokenizers of GPT-2, Llama 3, Qwen and SentencePiece; this one "
            f"differs ({model['type']}, normalizer {normalizer}): if its folder also has a "
            "tokenizer.model, import it without the tokenizer.json"
        )
    if not model["merges"]:
        raise UserError("GGUF has no byte tokenizer: llama.cpp refuses a BPE without merges")
    added = {token["id"]: token for token in definition["added_tokens"]}
    of_id = {i: token for token, i in model["vocab"].items()}
    of_id |= {i: token["content"] for i, token in added.items()}
    tokens = [of_id.get(i, f"[PAD{i}]") for i in range(max(of_id) + 1)]
    types = [_NORMAL if i in of_id else _UNUSED for i in range(len(tokens))]
    for i, token in added.items():
        types[i] = _CONTROL if token["special"] else _USER_DEFINED
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_WORDS[words])
    writer.add_token_merges(merges)
    return tokens, types


def _write_sentencepiece(
    writer: Any, tokenizer: SentencePieceTokenizer, log: Log
) -> tuple[list[str], list[int], list[float]]:
    """Write a SentencePiece model's settings; return pieces, types and scores."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(  # type: ignore[attr-defined]
        tokenizer.model
    )
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type == _BPE:
        _check_bpe(trainer, rules)
        if rules.remove_extra_whitespaces:
            log("llama.cpp keeps outer and repeated spaces, which the tokenizer drops")
        writer.add_tokenizer_model("llama")
    elif trainer.model_type == _UNIGRAM:
        writer.add_tokenizer_model("t5")
        writer.add_remove_extra_whitespaces(rules.remove_extra_whitespaces)
        if rules.precompiled_charsmap:
            writer.add_precompiled_charsmap(rules.precompiled_charsmap)
    else:
        raise UserError("GGUF supports only SentencePiece models of the types BPE and unigram")
    if trainer.treat_whitespace_as_suffix:
        raise UserError("GGUF does not support SentencePiece models that mark spaces after words")
    writer.add_tokenizer_pre("default")
    writer.add_add_space_prefix(rules.add_dummy_prefix)
    pieces: Sequence[Any] = proto.pieces
    return [p.piece for p in pieces], [p.type for p in pieces], [p.score for p in pieces]


def _check_bpe(trainer: Any, rules: Any) -> None:
    """Raise UserError for a BPE model that llama.cpp would read differently."""
    if not trainer.byte_fallback:
        raise UserError(
            "llama.cpp needs the 256 byte pieces in a SentencePiece BPE model (byte_fallback), "
            "which this one lacks"
        )
    if rules.precompiled_charsmap:
        raise UserError(
            "llama.cpp does not normalize texts for a SentencePiece BPE model, but this one does "
            f"({rules.name})"
        )
