"""Tokenizer files of model folders: read on import, written as tokenizer.json on export.

A SentencePiece model exported as tokenizer.json differs from the original on a literal "▁", which
becomes a space.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lm.data.tokenizers.characters import ByteTokenizer, CharTokenizer
from lm.data.tokenizers.hf import Gpt2Tokenizer, HuggingFaceTokenizer
from lm.data.tokenizers.sentencepiece import SentencePieceTokenizer
from lm.data.tokenizers.tokenizer import Tokenizer
from lm.errors import UserError

DELIMITER = "<|endoftext|>"
_SENTENCEPIECE = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
_ROLES = {  # key of tokenizer_config.json: names under which a vocabulary may have the token
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>", DELIMITER),
    "eos_token": ("</s>", "<eos>", "<|end_of_text|>", "[SEP]", DELIMITER),
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
    "mask_token": ("[MASK]", "<mask>"),
}


def read_tokenizer(source: Path) -> Tokenizer | None:
    """Return the tokenizer of a model folder, or beside a .bin file; None if there is none."""
    if source.is_file():
        models = sorted(source.parent.glob("*.model"))
        return _checked(SentencePieceTokenizer, models[0]) if len(models) == 1 else None
    if (source / "tokenizer.json").is_file():
        return _checked(HuggingFaceTokenizer, source / "tokenizer.json")
    for name in _SENTENCEPIECE:
        if (source / name).is_file():
            return _checked(SentencePieceTokenizer, source / name)
    if (source / "vocab.json").is_file() and (source / "merges.txt").is_file():
        vocabulary = (source / "vocab.json").read_bytes()
        return _checked(lambda merges: Gpt2Tokenizer(vocabulary, merges), source / "merges.txt")
    if (source / "vocab.txt").is_file():
        return _checked(_word_pieces(source), source / "vocab.txt")
    return None


def _checked(kind: Callable[[bytes], Tokenizer], file: Path) -> Tokenizer:
    tokenizer = kind(file.read_bytes())
    try:
        tokenizer.vocab_size  # noqa: B018  loads it
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    return tokenizer


def _word_pieces(source: Path) -> Callable[[bytes], Tokenizer]:
    """Return the constructor of a WordPiece tokenizer, set by tokenizer_config.json."""
    settings: dict[str, Any] = {}
    if (source / "tokenizer_config.json").is_file():
        settings = json.loads((source / "tokenizer_config.json").read_text())

    def make(vocabulary: bytes) -> Tokenizer:
        import tokenizers

        lines = vocabulary.decode().splitlines()
        made = tokenizers.BertWordPieceTokenizer(
            {piece: i for i, piece in enumerate(lines)},
            lowercase=settings.get("do_lower_case", True),
            handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
            strip_accents=settings.get("strip_accents"),
        )
        return HuggingFaceTokenizer(made.to_str().encode())

    return make


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> bool:
    """Write tokenizer.json and tokenizer_config.json; return False if there is no equivalent."""
    definition = _definition(tokenizer)
    if definition is None:
        return False
    (folder / "tokenizer.json").write_bytes(definition)
    known = set(_vocabulary(definition))
    roles = {
        role: next(name for name in names if name in known)
        for role, names in _ROLES.items()
        if not known.isdisjoint(names)
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **roles,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return True


def _vocabulary(definition: bytes) -> Mapping[str, int]:
    import tokenizers

    return tokenizers.Tokenizer.from_buffer(definition).get_vocab(with_added_tokens=True)


def _definition(tokenizer: Tokenizer) -> bytes | None:
    match tokenizer:
        case HuggingFaceTokenizer():
            return tokenizer.definition
        case Gpt2Tokenizer():
            lines = tokenizer.merges.decode().splitlines()
            merges = [tuple(x.split(" ")) for x in lines if x and not x.startswith("#version:")]
            return _byte_level(json.loads(tokenizer.encoder), merges)
        case ByteTokenizer():
            vocabulary = {_BYTES[i]: i for i in range(256)} | {DELIMITER: tokenizer.eos_id}
            return _byte_level(vocabulary, [])
        case CharTokenizer():
            return _characters(tokenizer)
        case SentencePieceTokenizer():
            return _sentencepiece(tokenizer)
    return None


def _byte_level(vocabulary: dict[str, int], merges: list) -> bytes:
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    special = [name for names in _ROLES.values() for name in names if name in vocabulary]
    made.add_special_tokens(list(dict.fromkeys(special)))
    return made.to_str().encode()


def _byte_characters() -> list[str]:
    """Return GPT-2's character for every byte: Latin-1 if printable, else from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    free = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(free)) for byte in range(256)]


_BYTES = _byte_characters()


def _characters(tokenizer: CharTokenizer) -> bytes:
    import tokenizers

    vocabulary = {character: i for i, character in enumerate(tokenizer.alphabet)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    made.decoder = tokenizers.decoders.Fuse()
    return made.to_str().encode()


# --- SentencePiece

_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_CONTROL, _USER_DEFINED = 3, 4  # SentencePiece.Type


def _sentencepiece(tokenizer: SentencePieceTokenizer) -> bytes | None:
    import tokenizers
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, decoders, models, normalizers

    proto = sentencepiece_model_pb2.ModelProto.FromString(  # type: ignore[attr-defined]
        tokenizer.model
    )
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    scores = {piece.piece: piece.score for piece in proto.pieces}
    ids = {piece: i for i, piece in enumerate(scores)}
    unknown = proto.pieces[trainer.unk_id].piece
    if trainer.model_type == _BPE:
        made = tokenizers.Tokenizer(
            models.BPE(
                ids,
                _merges(scores, ids),
                unk_token=unknown,
                fuse_unk=True,
                byte_fallback=trainer.byte_fallback,
            )
        )
    elif trainer.model_type == _UNIGRAM:
        pieces = list(scores.items())
        made = tokenizers.Tokenizer(
            models.Unigram(pieces, trainer.unk_id, byte_fallback=trainer.byte_fallback)
        )
    else:
        return None
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    back: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        back.append(decoders.Strip(" ", 1, 0))
    made.decoder = decoders.Sequence(back)
    control = [piece.piece for piece in proto.pieces if piece.type == _CONTROL]
    made.add_special_tokens([AddedToken(name, normalized=False) for name in [unknown, *control]])
    defined = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    made.add_tokens([AddedToken(name, normalized=False) for name in defined])
    return made.to_str().encode()


def _merges(scores: Mapping[str, float], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Recover the merges of a BPE model: pairs that join to a piece, best score first."""
    found = []
    for piece, score in scores.items():
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
        known.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        found += [(score, pair) for pair in known]
    found.sort(key=lambda entry: -entry[0])
    return [pair for _, pair in found]
