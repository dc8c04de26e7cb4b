"""Tokenizer files of model folders: read on import, written as tokenizer.json on export.

A SentencePiece model exported as tokenizer.json differs from the original on a literal "▁", which
becomes a space.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from lm.data.chat.extended_tokenizer import ExtendedTokenizer
from lm.data.special_tokens import special_tokens
from lm.data.tokenizer import Tokenizer
from lm.data.tokenizers.basic import ByteTokenizer, CharTokenizer
from lm.data.tokenizers.folder import CONFIG, GENERATION, FolderTokenizer
from lm.data.tokenizers.hf import BYTE_CHARACTERS, Gpt2Tokenizer, HuggingFaceTokenizer, read_merges
from lm.data.tokenizers.sentencepiece import SentencePieceTokenizer
from lm.errors import UserError
from lm.storage import parse_json, read_json

DELIMITER = "<|endoftext|>"
# Other keys of config.json: generation settings, stored there by transformers 4, and the version,
# which determines how transformers reads the tokenizer of some families.
_KEPT_KEYS = (
    "transformers_version",
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "temperature"),
    *("top_k", "top_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
    *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_decoder_ids"),
    *("task_specific_params", "prefix"),
)
_ROLES = {  # key of tokenizer_config.json: possible names of the token in a vocabulary
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>", DELIMITER),
    "eos_token": ("</s>", "<eos>", "<|end_of_text|>", "[SEP]", DELIMITER),
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
    "mask_token": ("[MASK]", "<mask>"),
}


def read_tokenizer(source: Path) -> Tokenizer | None:
    """Return the tokenizer of a model folder, or next to a .bin file; None if there is none.

    Raises:
        UserError: a tokenizer file is damaged.
    """
    if not source.is_file():
        return FolderTokenizer.read(source)
    models = sorted(source.parent.glob("*.model"))
    if len(models) != 1:
        return None
    tokenizer = SentencePieceTokenizer(models[0].read_bytes())
    try:
        tokenizer.vocab_size  # noqa: B018  loads it
    except UserError as error:
        raise UserError(f"{models[0]}: {error}") from error
    return tokenizer


def model_settings(tokenizer: FolderTokenizer) -> dict[str, Any]:
    """Return what an imported folder's config.json says about special tokens and generation."""
    stated = tokenizer.stated(CONFIG) or {}
    return {
        key: value
        for key, value in stated.items()
        if key.endswith("_token_id") or key in _KEPT_KEYS
    }


def write_tokenizer(tokenizer: Tokenizer, folder: Path, family: str, length: int | None) -> bool:
    """Write the files of a tokenizer; return False if it has no equivalent.

    Those of an imported folder are copied unchanged. Otherwise a tokenizer.json is created that
    adds the same tokens around a text as this library.

    Args:
        tokenizer: tokenizer of the run.
        folder: existing folder.
        family: `--config.model.family`.
        length: maximum number of tokens per text; None: any.
    """
    if isinstance(tokenizer, ExtendedTokenizer):
        written = write_tokenizer(tokenizer.base, folder, family, length)
        if written:
            _write_added(tokenizer, folder)
        return written
    if isinstance(tokenizer, FolderTokenizer):
        for name, content in tokenizer.files().items():
            if name != CONFIG:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(content)
        return True
    definition = _definition(tokenizer)
    if definition is None:
        return False
    definition = _with_template(definition, tokenizer, family)
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
        **({} if length is None else {"model_max_length": length}),
        **roles,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return True


def _write_added(tokenizer: ExtendedTokenizer, folder: Path) -> None:
    """Add tokens and a chat template to the files of a tokenizer.

    Raises:
        UserError: the tokens would get different ids there.
    """
    import tokenizers

    settings_file, definition_file = folder / "tokenizer_config.json", folder / "tokenizer.json"
    settings = read_json(settings_file) if settings_file.exists() else {}
    ids = {name: tokenizer.base.vocab_size + i for i, name in enumerate(tokenizer.names)}
    if definition_file.exists():
        made = tokenizers.Tokenizer.from_file(str(definition_file))
        made.add_special_tokens(
            [tokenizers.AddedToken(name, normalized=False, special=True) for name in ids]
        )
        for name, i in ids.items():
            if (there := made.token_to_id(name)) != i:
                raise UserError(f"the added token {name!r} has id {i}, but would get {there}")
        definition_file.write_text(made.to_str())
    if "added_tokens_decoder" in settings or not definition_file.exists():
        flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
        settings["added_tokens_decoder"] = settings.get("added_tokens_decoder", {}) | {
            str(i): {"content": name, **flags, "special": True} for name, i in ids.items()
        }
    if tokenizer.jinja:
        settings.pop("chat_template", None)
        for other in folder.glob("additional_chat_templates/*.jinja"):
            other.unlink()
        (folder / "chat_template.jinja").write_text(tokenizer.jinja)
    settings_file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def write_turn_ends(tokenizer: Tokenizer, folder: Path) -> None:
    """Make the end of an assistant's turn also end generation."""
    from lm.data.chat.chat_template import ChatTemplate

    generation_file = folder / GENERATION
    generation = read_json(generation_file) if generation_file.exists() else {}
    generation["eos_token_id"] = list(ChatTemplate.of(tokenizer).stop_ids)
    generation_file.write_text(json.dumps(generation, indent=2) + "\n")


def _with_template(definition: bytes, tokenizer: Tokenizer, family: str) -> bytes:
    """Return a tokenizer.json that adds the same tokens around texts and pairs as this library.

    A decoder's prompt starts with bos, an encoder–decoder's source ends with eos, and an encoder's
    texts stand between cls and sep. Ids beyond the tokenizer's, which only the model has, are
    left out.
    """
    import tokenizers

    made = tokenizers.Tokenizer.from_buffer(definition)
    special = special_tokens(tokenizer)
    before: tuple[int, ...]
    after: tuple[int, ...]
    if family == "encoder":
        before, after = (special.cls,), (special.sep,)
    elif "encoder_decoder" in family:
        before, after = special.around_source.before, special.around_source.after
    else:
        before, after = tokenizer.template.before, ()
    names = {i: made.id_to_token(i) for i in (*before, *after)}
    first, last = ([names[i] for i in part if names[i] is not None] for part in (before, after))
    if not first and not last:
        return definition
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=[*(f"{name}:0" for name in first), "$A:0", *(f"{name}:0" for name in last)],
        pair=[
            *(f"{name}:0" for name in first),
            "$A:0",
            *(f"{name}:0" for name in last),
            "$B:1",
            *(f"{name}:1" for name in last),
        ],
        special_tokens=[(name, i) for i, name in names.items() if name is not None],
    )
    return made.to_str().encode()


def _vocabulary(definition: bytes) -> Mapping[str, int]:
    import tokenizers

    return tokenizers.Tokenizer.from_buffer(definition).get_vocab(with_added_tokens=True)


def _definition(tokenizer: Tokenizer) -> bytes | None:
    match tokenizer:
        case HuggingFaceTokenizer():
            return tokenizer.definition
        case Gpt2Tokenizer():
            return _byte_level(
                parse_json(tokenizer.encoder, "encoder.json"), read_merges(tokenizer.merges)
            )
        case ByteTokenizer():
            vocabulary = {BYTE_CHARACTERS[i]: i for i in range(256)} | {DELIMITER: tokenizer.eos_id}
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


def _characters(tokenizer: CharTokenizer) -> bytes:
    import tokenizers

    vocabulary = {character: i for i, character in enumerate(tokenizer.alphabet)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    made.decoder = tokenizers.decoders.Fuse()
    return made.to_str().encode()


# --- SentencePiece

_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # SentencePiece.Type


def _sentencepiece(tokenizer: SentencePieceTokenizer) -> bytes | None:
    """Return the tokenizer.json of a SentencePiece model; None if there is no equivalent.

    User-defined symbols are split off the normalized text before the model encodes it.
    """
    import tokenizers
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

    proto = sentencepiece_model_pb2.ModelProto.FromString(  # type: ignore[attr-defined]
        tokenizer.model
    )
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    scores = {piece.piece: piece.score for piece in proto.pieces}
    ids = {piece: i for i, piece in enumerate(scores)}
    unknown = proto.pieces[trainer.unk_id].piece
    in_text = {p.piece for p in proto.pieces if p.type in (_NORMAL, _USER_DEFINED)}
    defined = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    if trainer.model_type == _BPE:
        if defined and not _are_reachable(proto):
            return None
        made = tokenizers.Tokenizer(
            models.BPE(
                ids,
                _merges({p: s for p, s in scores.items() if p in in_text}, ids),
                unk_token=unknown,
                fuse_unk=True,
                byte_fallback=trainer.byte_fallback,
                ignore_merges=bool(defined),
            )
        )
    elif trainer.model_type == _UNIGRAM:
        # The score of a single symbol is above that of any way to spell it.
        pieces = list((scores | dict.fromkeys(defined, 0.0)).items())
        made = tokenizers.Tokenizer(
            models.Unigram(pieces, trainer.unk_id, byte_fallback=trainer.byte_fallback)
        )
    else:
        return None
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
        if any(steps[0].normalize_str(symbol) != symbol for symbol in defined):
            return None
    if rules.remove_extra_whitespaces:
        # Only spaces, whereas normalizers.Strip also removes newlines.
        steps += [
            normalizers.Replace(Regex(r"\A +| +\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    is_suffix = trainer.treat_whitespace_as_suffix
    if rules.add_dummy_prefix and is_suffix:
        steps.append(normalizers.Replace(Regex(r"(?<=[\s\S])\z"), "▁"))
    elif rules.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    cuts = []
    if defined:
        longest_first = sorted(defined, key=len, reverse=True)
        cuts.append("|".join(map(re.escape, longest_first)))
    if trainer.model_type == _UNIGRAM:
        names = [piece.piece for piece in proto.pieces if piece.piece not in in_text]
        cuts += _inside_names(names, in_text)
    splits = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in cuts]
    if splits:
        made.pre_tokenizer = pre_tokenizers.Sequence(splits)
    back: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        back.append(decoders.Strip(" ", int(not is_suffix), int(is_suffix)))
    made.decoder = decoders.Sequence(back)
    control = [piece.piece for piece in proto.pieces if piece.type == _CONTROL]
    made.add_special_tokens([AddedToken(name, normalized=False) for name in [unknown, *control]])
    return made.to_str().encode()


def _inside_names(names: Iterable[str], pieces: Collection[str]) -> list[str]:
    """Return patterns that split names of control pieces and bytes, such as "<s>", in two.

    Unigram matches any piece in a text, but SentencePiece never matches these. The split is where
    no other piece crosses it.
    """
    pairs = {piece[i : i + 2] for piece in pieces for i in range(len(piece) - 1)}
    places: dict[tuple[str, str], None] = {}
    for name in names:
        free = (i for i in range(1, len(name)) if name[i - 1 : i + 1] not in pairs)
        if (at := next(free, None)) is not None:
            places[name[:at], name[at:]] = None
    cuts = [f"(?<={re.escape(left)})(?={re.escape(right)})" for left, right in places]
    return ["|".join(cuts)] if cuts else []


def _are_reachable(proto: Any) -> bool:
    """Return whether a BPE model encodes the text of each piece as that piece."""
    import sentencepiece

    plain = type(proto).FromString(proto.SerializeToString())
    rules = plain.normalizer_spec
    rules.precompiled_charsmap, rules.name = b"", "identity"
    rules.add_dummy_prefix = rules.remove_extra_whitespaces = False
    processor = sentencepiece.SentencePieceProcessor(model_proto=plain.SerializeToString())
    texts = [piece.piece for piece in proto.pieces if piece.type == _NORMAL]
    return all(
        ids == [processor.piece_to_id(text)]
        for text, ids in zip(texts, processor.encode(texts), strict=True)
    )


def _merges(scores: Mapping[str, float], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Recover the merges of a BPE model: pairs that join to a piece, by decreasing score."""
    found = []
    for piece, score in scores.items():
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
        known.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        found += [(score, pair) for pair in known]
    found.sort(key=lambda entry: -entry[0])
    return [pair for _, pair in found]
