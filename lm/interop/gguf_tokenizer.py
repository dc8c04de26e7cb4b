"""Tokenizers in GGUF: byte-level BPE with its merges, and SentencePiece models with their scores.

llama.cpp finds words by built-in expressions (`tokenizer.ggml.pre`), encodes a SentencePiece BPE
model by its scores, and writes bytes for what it does not know. What it cannot repeat exactly is
refused.
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

# Names in llama.cpp (src/llama-vocab.cpp) of the expressions that cut a text into words.
_WORDS = {GPT2_WORDS: "gpt-2", LLAMA3_WORDS: "llama-bpe", QWEN_WORDS: "qwen2"}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = range(1, 6)  # gguf.TokenType
_ADDED_SCORE = -1000.0  # as in llama.cpp's own conversion
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType of SentencePiece


def write_gguf_tokenizer(writer: Any, tokenizer: Tokenizer | None, n_rows: int, log: Log) -> None:
    """Write a tokenizer to a GGUF file.

    Args:
        writer: gguf.GGUFWriter.
        tokenizer: tokenizer of the run; None: the file has none.
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
                f"GGUF has no {vocabulary.kind} tokenizer: it has byte-level BPE and SentencePiece"
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
    """Write special ids, whether texts start and end with them, and the chat template."""
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
        raise UserError("GGUF puts bos or nothing before a text, and this tokenizer other tokens")
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(False)
    template = getattr(tokenizer, "chat_templates", {}).get("default")
    if template:
        writer.add_chat_template(template)


def _write_byte_level(writer: Any, definition: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Write a byte-level BPE of a tokenizer.json; return its tokens and their types."""
    model, words = definition["model"], word_pattern(definition["pre_tokenizer"])
    normalizer = (definition.get("normalizer") or {}).get("type")
    if model["type"] != "BPE" or words not in _WORDS or normalizer not in (None, "NFC"):
        raise UserError(
            "GGUF has the tokenizers of GPT-2, Llama 3, Qwen and SentencePiece; this one is "
            f"another ({model['type']}, normalizer {normalizer}): where its folder has a "
            "tokenizer.model too, import without the tokenizer.json"
        )
    if not model["merges"]:
        raise UserError("GGUF has no byte tokenizer: a BPE without merges is refused by llama.cpp")
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
    """Write the settings of a SentencePiece model; return pieces, types and scores."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(  # type: ignore[attr-defined]
        tokenizer.model
    )
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type == _BPE:
        _check_bpe(trainer, rules)
        if rules.remove_extra_whitespaces:
            log("llama.cpp keeps spaces at the ends and repeated ones, which the tokenizer drops")
        writer.add_tokenizer_model("llama")
    elif trainer.model_type == _UNIGRAM:
        writer.add_tokenizer_model("t5")
        writer.add_remove_extra_whitespaces(rules.remove_extra_whitespaces)
        if rules.precompiled_charsmap:
            writer.add_precompiled_charsmap(rules.precompiled_charsmap)
    else:
        raise UserError("GGUF has SentencePiece models of the types BPE and unigram only")
    if trainer.treat_whitespace_as_suffix:
        raise UserError("GGUF has no SentencePiece model that marks the space after a word")
    writer.add_tokenizer_pre("default")
    writer.add_add_space_prefix(rules.add_dummy_prefix)
    pieces: Sequence[Any] = proto.pieces
    return [p.piece for p in pieces], [p.type for p in pieces], [p.score for p in pieces]


def _check_bpe(trainer: Any, rules: Any) -> None:
    """Raise UserError for a BPE model that llama.cpp would read differently."""
    if not trainer.byte_fallback:
        raise UserError(
            "llama.cpp needs the 256 bytes in a SentencePiece BPE model (byte_fallback), "
            "which this one lacks"
        )
    if rules.precompiled_charsmap:
        raise UserError(
            "llama.cpp does not normalize texts for a SentencePiece BPE model, as this one does "
            f"({rules.name})"
        )
