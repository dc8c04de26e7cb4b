"""Tokenizer `folder`: tokenizer of a Hugging Face model folder, with its special tokens.

The files are kept unchanged: they are parsed again when a run is loaded, and written back on
export, with a tokenizer.json if the vocabulary is a tiktoken file. `FolderTokenizer.special`
resolves the special tokens like `transformers`: tokenizer_config.json takes precedence over
special_tokens_map.json and over the defaults of the tokenizer's class; for stop tokens,
generation_config.json over config.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from lm.data.files import find_file
from lm.data.tokenizer import Template, Tokenizer
from lm.data.tokenizers.byte_level import QWEN_WORDS
from lm.data.tokenizers.hf import HuggingFaceTokenizer, package_errors, read_merges
from lm.data.tokenizers.sentencepiece import SentencePieceTokenizer
from lm.data.tokenizers.tiktoken_file import LLAMA3_TOKENS, is_tiktoken, tiktoken_definition
from lm.errors import UserError, missing_package
from lm.storage import parse_json

GENERATION, CONFIG = "generation_config.json", "config.json"
_DEFINITION, _VOCABULARY, _MERGES = "tokenizer.json", "vocab.json", "merges.txt"
_WORD_PIECES = "vocab.txt"
_MODELS = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
_SETTINGS, _SPECIAL_MAP = "tokenizer_config.json", "special_tokens_map.json"
_ADDED = "added_tokens.json"
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
_VOCABULARY_FILES = (_DEFINITION, *_MODELS, _VOCABULARY, _MERGES, _WORD_PIECES)
_FILES = (
    *_VOCABULARY_FILES,
    *(_SETTINGS, _SPECIAL_MAP, _ADDED, GENERATION, CONFIG, *_TEMPLATES),
)

_ROLES = ("bos", "eos", "unk", "pad", "cls", "sep", "mask")
_BERT = {"unk": "[UNK]", "pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
_LLAMA = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}
_ROBERTA = _LLAMA | {"sep": "</s>", "cls": "<s>", "pad": "<pad>", "mask": "<mask>"}
_DELIMITER = "<|endoftext|>"
# Special tokens by tokenizer class if the files name none; a missing role means no such token.
_DEFAULTS: Mapping[str, Mapping[str, str]] = {
    "Bert": _BERT,
    "GPT2": dict.fromkeys(("bos", "eos", "unk"), _DELIMITER),
    "Gemma": {"bos": "<bos>", "eos": "<eos>", "unk": "<unk>", "pad": "<pad>", "mask": "<mask>"},
    "Llama": _LLAMA,
    "CodeLlama": _LLAMA,
    "PreTrained": {},
    "Tokenizers": {},  # TokenizersBackend
    "Qwen2": dict.fromkeys(("eos", "unk", "pad"), _DELIMITER),
    "Roberta": _ROBERTA,
    "XLMRoberta": _ROBERTA,
    "T5": {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"},
}
_CLASS_OF_MODEL = {
    **{"bert": "Bert", "roberta": "Roberta", "gpt2": "GPT2", "t5": "T5", "llama": "Llama"},
    **{"mistral": "Llama", "mixtral": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen2"},
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), "Gemma"),
}
# Template of classes with a SentencePiece model: before and after the text.
_AROUND: Mapping[str, tuple[str, ...]] = {
    "Llama": ("bos", "text"),
    "CodeLlama": ("bos", "text"),
    "Gemma": ("bos", "text"),
    "T5": ("text", "eos"),
    "XLMRoberta": ("cls", "text", "sep"),
}

_OWN_TEMPLATE = ("Bert", "Roberta", "XLMRoberta", "T5")  # they ignore add_bos_token


@dataclass(frozen=True)
class SpecialIds:
    """Special ids of a model folder.

    Attributes:
        of_role: id by role: bos, eos, unk, pad, cls, sep, mask, decoder_start.
        stop: ids that end a generated text.
        template: ids that the tokenizer adds around a text.
    """

    of_role: Mapping[str, int]
    stop: tuple[int, ...]
    template: Template


@dataclass(frozen=True)
class FolderTokenizer(Tokenizer):
    """Tokenizer of a model folder; `content` holds its files as (name, content)."""

    content: tuple[tuple[str, bytes], ...] = field(repr=False)
    kind: ClassVar[str] = "folder"
    states_template: ClassVar[bool] = True

    @classmethod
    def from_argument(cls, argument: str, data: Any) -> Self:
        folder = find_file(argument, data)
        found = cls.read(folder)
        if found is None:
            raise UserError(f"{folder} has none of {', '.join(_VOCABULARY_FILES)}")
        return found

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Read the tokenizer of a folder; None if it has no vocabulary file.

        Raises:
            UserError: a file is damaged, or names an id that is not in the vocabulary.
        """
        paths = [path for name in _FILES for path in sorted(folder.glob(name)) if path.is_file()]
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        if not files.keys() & {_DEFINITION, *_MODELS, _WORD_PIECES} and not (
            files.keys() >= {_VOCABULARY, _MERGES}
        ):
            return None
        found = cls.from_files(files)
        try:
            if _DEFINITION not in files and (name := _tiktoken_name(files)):
                found = cls.from_files(found._of_tiktoken(name) | files)
            found.special  # noqa: B018  parses all files
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error
        return found

    def __reduce__(self) -> tuple:
        return type(self), (self.content,)

    def files(self) -> dict[str, bytes]:
        return dict(self.content)

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Self:
        return cls(tuple(sorted(files.items())))

    # --- contents of the files

    def stated(self, name: str) -> dict[str, Any] | None:
        """Parse a JSON file of the folder; None if it does not exist."""
        content = self.files().get(name)
        return None if content is None else parse_json(content, name, whole_characters=True)

    @cached_property
    def _settings(self) -> dict[str, Any]:
        return self.stated(_SETTINGS) or {}

    @cached_property
    def _class(self) -> str:
        """Tokenizer class name without Tokenizer or TokenizerFast; "" if unknown."""
        name = self._settings.get("tokenizer_class")
        if isinstance(name, str):
            return re.sub(r"Tokenizer(Fast)?$|Backend$", "", name)
        kind = (self.stated(CONFIG) or {}).get("model_type")
        return _CLASS_OF_MODEL.get(kind, "") if isinstance(kind, str) else ""

    @cached_property
    def base(self) -> Tokenizer:
        """Tokenizer of the vocabulary; includes added tokens unless it is SentencePiece."""
        files = self.files()
        added = self._added
        if _DEFINITION in files:
            return _from_definition(_DEFINITION, files[_DEFINITION], added)
        for name in _MODELS:
            if name in files:
                found = SentencePieceTokenizer(files[name])
                _load(found, name)
                return found
        if _MERGES in files and _VOCABULARY in files:
            made = _byte_level(files[_VOCABULARY], files[_MERGES], self._class, self._settings)
            return _from_definition(_VOCABULARY, made, added)
        made = _word_pieces(files[_WORD_PIECES], self._settings, self._names)
        return _from_definition(_WORD_PIECES, made, added)

    @cached_property
    def _added(self) -> dict[int, dict[str, Any]]:
        """Added tokens by id, each with `content` and `special`."""
        stated = self._settings.get("added_tokens_decoder")
        if stated is None:
            ids = self.stated(_ADDED) or {}
            special = {name for name in self._names.values() if name}
            found = {
                _as_id(f"{_ADDED}: {name!r}", i): {"content": name, "special": name in special}
                for name, i in ids.items()
            }
            return dict(sorted(found.items()))
        if not isinstance(stated, dict):
            raise UserError(f"{_SETTINGS}: added_tokens_decoder is not an object")
        found = {}
        for number, about in stated.items():
            place = f"{_SETTINGS}: added_tokens_decoder"
            content = about.get("content") if isinstance(about, dict) else None
            is_id = re.fullmatch("[0-9]{1,8}", number) and int(number) < _MOST_IDS
            if not is_id or not isinstance(content, str):
                raise UserError(
                    f"{place}: {number[:20]!r} is not an id with an object as its content"
                )
            flags = {
                name: about.get(name, default)
                for name, default in (
                    *(("special", False), ("lstrip", False), ("rstrip", False)),
                    *(("single_word", False), ("normalized", True)),
                )
            }
            if not all(isinstance(flag, bool) for flag in flags.values()):
                raise UserError(f"{place}: a setting of {number} is not true or false")
            found[int(number)] = {"content": content, **flags}
        return dict(sorted(found.items()))

    @cached_property
    def _names(self) -> dict[str, str | None]:
        """Special tokens by role; unknown roles are missing."""
        special_map = self.stated(_SPECIAL_MAP) or {}
        found: dict[str, str | None] = {}
        is_sentencepiece = not {_DEFINITION, _MERGES, _WORD_PIECES} & self.files().keys()
        defaults = _DEFAULTS.get(self._class)
        if defaults == {} and is_sentencepiece:
            defaults = None  # the model file has its own
        for role in _ROLES:
            key = f"{role}_token"
            for name, values in ((_SETTINGS, self._settings), (_SPECIAL_MAP, special_map)):
                if key in values:
                    found[role] = _token_text(name, key, values[key])
                    break
            else:
                if defaults is not None:
                    found[role] = defaults.get(role)
        return found

    @property
    def special_names(self) -> Mapping[str, str | None]:
        """Special tokens by role, such as bos; None if the files say that there is none."""
        return self._names

    @property
    def added_tokens(self) -> dict[str, bool]:
        """Added tokens from the settings; True if special."""
        return {token["content"]: bool(token["special"]) for token in self._added.values()}

    @property
    def chat_templates(self) -> dict[str, str]:
        """Jinja chat templates by name; "default" is the fallback."""
        of_text, of_json, _ = _TEMPLATES
        found = {
            "default" if name == of_text else Path(name).stem: content.decode(errors="replace")
            for name, content in self.files().items()
            if name.endswith(".jinja")
        }
        if found:
            return found
        stated = (self.stated(of_json) or self._settings).get("chat_template")
        several = stated if isinstance(stated, list) else [{"name": "default", "template": stated}]
        named = {x.get("name"): x.get("template") for x in several if isinstance(x, dict)}
        return {str(name): text for name, text in named.items() if isinstance(text, str)}

    def _of_tiktoken(self, name: str) -> dict[str, bytes]:
        """Return the files that a folder with a tiktoken file lacks, following Llama 3."""
        try:
            names = [token["content"] for token in self._added.values()] or LLAMA3_TOKENS
            definition = tiktoken_definition(self.files()[name], names)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        about = {"tokenizer_class": "PreTrainedTokenizerFast"}
        about |= {"bos_token": LLAMA3_TOKENS[0], "eos_token": LLAMA3_TOKENS[1]}
        return {_DEFINITION: definition, _SETTINGS: json.dumps(about).encode()}

    def _states(self, key: str) -> bool:
        return key in self._settings or key in (self.stated(_SPECIAL_MAP) or {})

    @cached_property
    def special(self) -> SpecialIds:
        """Special ids resolved from all files."""
        config = self.stated(CONFIG) or {}
        generation = self.stated(GENERATION)
        of_model = {
            key: ids
            for values, name in ((config, CONFIG), (generation or {}, GENERATION))
            for key in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
            if (ids := _ids(name, key, values.get(key)))
        }
        of_role: dict[str, int] = {}
        for role in _ROLES:
            name = self._names.get(role)
            if name is not None and (found := self.token_id(name)) is not None:
                of_role[role] = found
        for role, guessed in (("bos", self.base.bos_id), ("eos", self.base.eos_id)):
            if role not in self._names and guessed is not None:
                of_role[role] = guessed
        of_tokenizer = dict(of_role)
        own_end = (of_role["eos"],) if "eos" in of_role else ()
        stop: tuple[int, ...] = of_model.get("eos_token_id") or own_end
        for role in ("bos", "eos", "pad"):
            ids = of_model.get(f"{role}_token_id", ())
            if role == "eos" and ids and not self._states("eos_token"):
                of_role[role] = ids[0]  # explicit ids take precedence over class defaults
            # A tokenizer that explicitly has no bos does not use the model's.
            if ids and role not in of_role and not (role == "bos" and "bos" in self._names):
                of_role[role] = ids[0]
        for role, instead in (("bos", "cls"), ("eos", "sep")):
            if instead in of_role:
                of_role.setdefault(role, of_role[instead])
        start = of_model.get("decoder_start_token_id")
        if start:
            of_role["decoder_start"] = start[0]
        return SpecialIds(of_role, stop, self._template(of_role | of_tokenizer))

    def _template(self, of_role: Mapping[str, int]) -> Template:
        if isinstance(self.base, HuggingFaceTokenizer):
            found = self.base.post_processor_template
        else:
            around = _AROUND.get(self._class, ("bos", "text"))
            at = around.index("text")
            before, after = (
                tuple(of_role[role] for role in part if role in of_role)
                for part in (around[:at], around[at + 1 :])
            )
            found = Template(before, after, (*after, *before))
        # transformers reads these keys only if there is no tokenizer.json.
        adds = {
            role: _setting(self._settings, f"add_{role}_token", None) for role in ("bos", "eos")
        }
        has_own = _DEFINITION in self.files() or self._class in _OWN_TEMPLATE
        if has_own or set(adds.values()) == {None}:
            return found
        of_file = isinstance(self.base, HuggingFaceTokenizer)
        if adds["bos"] is None and not of_file:
            adds["bos"] = bool(found.before)
        before, after = (
            (of_role[role],) if adds[role] and role in of_role and self._names.get(role) else ()
            for role in ("bos", "eos")
        )
        return Template(before, after, (*after, *before))

    # --- the interface

    @cached_property
    def vocab_size(self) -> int:  # type: ignore[override]
        return max(self.base.vocab_size, *(i + 1 for i in self._added), 0)

    @cached_property
    def n_text_ids(self) -> int:  # type: ignore[override]
        ordinary = (i + 1 for i, token in self._added.items() if not token["special"])
        around = (*self.special.template.before, *self.special.template.after)
        return max(self.base.n_text_ids, *ordinary, *(i + 1 for i in around), 0)

    @property
    def bos_id(self) -> int | None:
        return self.special.of_role.get("bos")

    @property
    def eos_id(self) -> int | None:
        return self.special.of_role.get("eos")

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self.special.stop

    @property
    def template(self) -> Template:
        return self.special.template

    def role_id(self, role: str) -> int | None:
        return self.special.of_role.get(role)

    @cached_property
    def _outside(self) -> dict[str, int]:
        """Added tokens that are not in the base tokenizer, by content."""
        if isinstance(self.base, HuggingFaceTokenizer):
            return {}
        known = self.base.token_id
        return {t["content"]: i for i, t in self._added.items() if known(t["content"]) != i}

    @cached_property
    def _split(self) -> re.Pattern[str] | None:
        special = {token["content"] for token in self._added.values() if token["special"]}
        names = sorted(self._outside.keys() - special, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names))})") if names else None

    def encode(self, text: str) -> np.ndarray:
        if self._split is None:
            return self.base.encode(text)
        ids = [
            np.asarray([self._outside[part]]) if number % 2 else self.base.encode(part)
            for number, part in enumerate(self._split.split(text))
            if part
        ]
        return np.concatenate([np.zeros(0, np.int32), *ids]).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._split is None:
            return self.base.encode_batch(texts)
        return super().encode_batch(texts)

    @cached_property
    def _bytes(self) -> dict[int, int]:
        """Byte value of each SentencePiece byte id."""
        if not isinstance(self.base, SentencePieceTokenizer):
            return {}
        ids = [self.base.token_id(f"<0x{byte:02X}>") for byte in range(256)]
        return {i: byte for byte, i in enumerate(ids) if i is not None}

    def _with_whole_characters(self, ids: Iterable[int]) -> Iterator[int]:
        """Replace each byte of an invalid UTF-8 run with U+FFFD, as transformers does."""
        id_of = {byte: i for i, byte in self._bytes.items()}
        for is_byte, part in groupby(map(int, ids), self._bytes.__contains__):
            run = list(part)
            try:
                bytes(self._bytes[i] for i in run if is_byte).decode()
            except UnicodeDecodeError:
                run = [id_of[byte] for byte in "\ufffd".encode()] * len(run)
            yield from run

    def decode(self, ids: Iterable[int]) -> str:
        if len(self._bytes) == 256:
            ids = self._with_whole_characters(ids)
        if not self._outside:
            return self.base.decode(ids)
        name_of = {i: name for name, i in self._outside.items()}
        return "".join(self._decoded(ids, name_of))

    def _decoded(self, ids: Iterable[int], name_of: Mapping[int, str]) -> Iterator[str]:
        for is_outside, part in groupby(map(int, ids), name_of.__contains__):
            run = list(part)
            yield "".join(name_of[i] for i in run) if is_outside else self.base.decode(run)

    def token_id(self, name: str) -> int | None:
        found = self._outside.get(name)
        return self.base.token_id(name) if found is None else found

    def pieces(self) -> list[str]:
        pieces = self.base.pieces()
        pieces += [""] * (self.vocab_size - len(pieces))
        for name, i in self._outside.items():
            pieces[i] = name
        return pieces


def _tiktoken_name(files: Mapping[str, bytes]) -> str | None:
    name = next((name for name in _MODELS if name in files), None)
    return name if name and is_tiktoken(files[name]) else None


def _token_text(file: str, key: str, value: Any) -> str | None:
    """Return the text of a special token, given as a string or an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise UserError(f"{file}: {key} is not text")
    return value or None


def _ids(file: str, key: str, value: Any) -> tuple[int, ...]:
    """Return an id or list of ids as a tuple; negative ids mean none."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i < 2**31 for i in values):
        raise UserError(f"{file}: {key} is neither an id nor a list of ids")
    return tuple(dict.fromkeys(i for i in values if i >= 0))


_MOST_IDS = 2**24  # a vocabulary is a list with one entry per id


def _as_id(place: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _MOST_IDS:
        raise UserError(f"{place} has no id below {_MOST_IDS:,}")
    return value


def _load(tokenizer: Tokenizer, file: str) -> None:
    try:
        size = tokenizer.vocab_size
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    if size > _MOST_IDS:
        raise UserError(f"{file}: the id {size - 1} is not below {_MOST_IDS:,}")


def _from_definition(
    file: str, definition: bytes, added: Mapping[int, Mapping[str, Any]]
) -> HuggingFaceTokenizer:
    """Build the tokenizer of a tokenizer.json, with the added tokens that it lacks.

    Texts are split at added tokens, including those that are ordinary vocabulary pieces.
    """
    found = HuggingFaceTokenizer(definition)
    _load(found, file)
    missing = [t for t in added.values() if t["content"] not in found.added_tokens]
    extended = HuggingFaceTokenizer(found.with_added_tokens(missing)) if missing else found
    for i, token in added.items():
        if extended.token_id(token["content"]) != i:
            of_file = found.token_id(token["content"])
            other = f"ends at {found.vocab_size - 1}" if of_file is None else f"has {of_file}"
            raise UserError(
                f"the added token {token['content']!r} has the id {i}, but the vocabulary of "
                f"{file} {other}"
            )
    return extended


# --- vocabularies without a tokenizer.json


def _package() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise missing_package("this tokenizer", "tokenizers", "hf") from error
    return tokenizers


def _setting(settings: Mapping[str, Any], name: str, default: bool | None) -> bool | None:
    value = settings.get(name, default)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{_SETTINGS}: {name} is neither true nor false")
    return value


def _word_pieces(
    vocabulary: bytes, settings: Mapping[str, Any], names: Mapping[str, str | None]
) -> bytes:
    """Build the tokenizer.json of a BERT tokenizer (Devlin et al. 2018)."""
    package = _package()
    try:
        text = vocabulary.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{_WORD_PIECES}: not UTF-8 at byte {error.start}") from error
    # Split at \n only: U+2028, U+0085 and others are entries of real vocabularies.
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    ids = {piece: i for i, piece in enumerate(lines)}
    known = {role: names.get(role) or _BERT[role] for role in _BERT}
    unknown = known["unk"]
    if unknown not in ids:
        raise UserError(f"{_WORD_PIECES}: {unknown} is missing")
    made = package.Tokenizer(package.models.WordPiece(ids, unk_token=unknown))
    made.normalizer = package.normalizers.BertNormalizer(
        lowercase=_setting(settings, "do_lower_case", True),
        handle_chinese_chars=_setting(settings, "tokenize_chinese_chars", True),
        strip_accents=_setting(settings, "strip_accents", None),
    )
    made.pre_tokenizer = package.pre_tokenizers.BertPreTokenizer()
    made.decoder = package.decoders.WordPiece(prefix="##")
    cls, sep = known["cls"], known["sep"]
    if cls in ids and sep in ids:
        made.post_processor = package.processors.TemplateProcessing(
            single=f"{cls}:0 $A:0 {sep}:0",
            pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
            special_tokens=[(cls, ids[cls]), (sep, ids[sep])],
        )
    made.add_special_tokens([name for name in known.values() if name in ids])
    return made.to_str().encode()


def _byte_level(vocabulary: bytes, merges: bytes, kind: str, settings: Mapping[str, Any]) -> bytes:
    """Build the tokenizer.json of a byte-level BPE, as used by GPT-2, RoBERTa and Qwen 2."""
    package = _package()
    ids = parse_json(vocabulary, _VOCABULARY, whole_characters=True)
    for name, i in ids.items():
        _as_id(f"{_VOCABULARY}: {name[:40]!r}", i)
    try:
        pairs = read_merges(merges)
    except UserError as error:
        raise UserError(f"{_MERGES}: {error}") from error
    with package_errors(f"{_VOCABULARY} and {_MERGES} do not match"):
        made = package.Tokenizer(package.models.BPE(ids, pairs))
    space = bool(_setting(settings, "add_prefix_space", False))
    if kind == "Qwen2":
        made.normalizer = package.normalizers.NFC()
        words = package.pre_tokenizers.Split(package.Regex(QWEN_WORDS), "isolated")
        letters = package.pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=False)
        made.pre_tokenizer = package.pre_tokenizers.Sequence([words, letters])
    else:
        made.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=space)
    made.decoder = package.decoders.ByteLevel()
    defaults = _DEFAULTS.get(kind, {})
    if kind == "Roberta" and all(name in ids for name in ("<s>", "</s>")):
        sep, cls = (("</s>", ids["</s>"]), ("<s>", ids["<s>"]))
        made.post_processor = package.processors.RobertaProcessing(sep, cls, True, space)
    special = [name for name in dict.fromkeys([*defaults.values(), _DELIMITER]) if name in ids]
    made.add_special_tokens(special)
    return made.to_str().encode()
