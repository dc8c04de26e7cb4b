"""Generation settings of model folders: forced and suppressed tokens, as `generate` reads them.

`transformers` reads them from generation_config.json or, without that file, from config.json.
"""

from __future__ import annotations

from typing import Any

from lm.data.tokenizer import Tokenizer
from lm.data.tokenizers.folder import CONFIG, GENERATION, FolderTokenizer
from lm.interop.class_defaults import CLASS_DEFAULTS

_CODES_AND_NAMES = """
af afrikaans am amharic ar arabic as assamese az azerbaijani ba bashkir be belarusian bg bulgarian
bn bengali bo tibetan br breton bs bosnian ca catalan ca valencian cs czech cy welsh da danish
de german el greek en english es spanish es castilian et estonian eu basque fa persian fi finnish
fo faroese fr french gl galician gu gujarati ha hausa haw hawaiian he hebrew hi hindi hr croatian
ht haitian_creole ht haitian hu hungarian hy armenian id indonesian is icelandic it italian
ja japanese jw javanese ka georgian kk kazakh km khmer kn kannada ko korean la latin
lb luxembourgish lb letzeburgesch ln lingala lo lao lt lithuanian lv latvian mg malagasy mi maori
mk macedonian ml malayalam mn mongolian mr marathi ms malay mt maltese my myanmar my burmese
ne nepali nl dutch nl flemish nn nynorsk no norwegian oc occitan pa punjabi pa panjabi pl polish
ps pashto ps pushto pt portuguese ro romanian ro moldavian ro moldovan ru russian sa sanskrit
sd sindhi si sinhala si sinhalese sk slovak sl slovenian sn shona so somali sq albanian sr serbian
su sundanese sv swedish sw swahili ta tamil te telugu tg tajik th thai tk turkmen tl tagalog
tr turkish tt tatar uk ukrainian ur urdu uz uzbek vi vietnamese yi yiddish yo yoruba yue cantonese
zh chinese zh mandarin
"""
_WORDS = _CODES_AND_NAMES.split()
# Whisper's language codes by the languages' names.
LANGUAGES = {
    name.replace("_", " "): code for code, name in zip(_WORDS[::2], _WORDS[1::2], strict=True)
}


def banned_tokens(tokenizer: Tokenizer | None, vocab_size: int) -> str:
    """Return the `decode.banned_tokens` of a folder's suppressed tokens.

    Args:
        tokenizer: tokenizer of a run.
        vocab_size: token ids of its model; others are left out.
    """
    settings = _settings(tokenizer)
    ids = {
        mark: [i for i in found if type(i) is int and 0 <= i < vocab_size]
        for mark, name in (("", "suppress_tokens"), ("^", "begin_suppress_tokens"))
        if isinstance(found := settings.get(name), list | tuple)
    }
    return ",".join(f"{mark}{i}" for mark, found in ids.items() for i in found)


def forced_tokens(tokenizer: Tokenizer | None) -> list[str]:
    """Return the tokens that a folder forces at the start of a target (Whisper): language and task.

    Those of texts without time stamps; [] if it names none, or lets the model detect the language.
    """
    ids = _forced_ids(_settings(tokenizer), _stated(tokenizer, CONFIG) or {})
    if tokenizer is None or any(type(i) is not int for i in ids):
        return []
    pieces = tokenizer.pieces()
    names = [pieces[i] for i in ids if 0 <= i < len(pieces)]
    return names if [tokenizer.token_id(name) for name in names] == ids else []


def _forced_ids(settings: dict[str, Any], about: dict[str, Any]) -> list[Any]:
    """Return the ids after the start token as `WhisperForConditionalGeneration.generate` does.

    Without a language and a task, `forced_decoder_ids` counts, with (place, id) pairs from 1.
    """
    tables = (settings.get(name) for name in ("lang_to_id", "task_to_id"))
    languages, tasks = (table if isinstance(table, dict) else {} for table in tables)
    language, task = settings.get("language"), settings.get("task")
    ids: list[Any] = []
    if language is None and task is None:
        pairs = settings.get("forced_decoder_ids") or about.get("forced_decoder_ids") or []
        try:
            places = [place for place, _ in pairs]
            ids = [i for _, i in pairs]
        except (TypeError, ValueError):
            return [None]
        if places != list(range(1, len(ids) + 1)):
            return [None]
    if isinstance(language, str):
        name = language.lower()
        name = name if name in languages else f"<|{LANGUAGES.get(name, name)}|>"
        ids = [languages.get(name)]
    elif language is not None or (languages and not ids):
        return [None]
    if task is not None or (language is not None and tasks):
        ids.append(tasks.get(task or "transcribe"))
    end = settings.get("no_timestamps_token_id")
    return ids if end is None or end in ids[-1:] else [*ids, end]


def _stated(tokenizer: Tokenizer | None, name: str) -> dict[str, Any] | None:
    return tokenizer.stated(name) if isinstance(tokenizer, FolderTokenizer) else None


def _settings(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the generation settings of a tokenizer's folder; {} without one."""
    if (found := _stated(tokenizer, GENERATION)) is not None:
        return found
    about = _stated(tokenizer, CONFIG) or {}
    kind = about.get("model_type")
    defaults = CLASS_DEFAULTS.get(kind, {}) if isinstance(kind, str) else {}
    return defaults | about
