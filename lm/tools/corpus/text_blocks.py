"""Local replacements for datatrove blocks that would download a model or a list."""

from __future__ import annotations

import hashlib
import heapq
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path

import phonenumbers
import regex
from datatrove.data import Document
from datatrove.pipeline.filters import C4BadWordsFilter
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.formatters.pii import PIIFormatter
from datatrove.utils.word_tokenizers import WhitespaceTokenizer
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from lm.data.personal_data import (
    EMAIL,
    IP,
    NEAR_AT,
    Span,
    find_cards,
    find_ibans,
    find_phones,
    is_public,
)
from lm.data.unwanted_words import UNSPACED, read_words, words_pattern
from lm.errors import UserError, nearest

_WORD = regex.compile(
    rf"[{UNSPACED}]|[[\p{{L}}\p{{M}}\p{{N}}_]--[{UNSPACED}]]+(?:['’]\p{{L}}+)*|\S",
    regex.V1,
)


class UnicodeWords(WhitespaceTokenizer):
    """Word tokenizer by Unicode classes, without a model; sentences as in datatrove's fallback.

    All instances are equal, so that blocks share datatrove's cache of a text's words.
    """

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    def __hash__(self) -> int:
        return hash(type(self))

    def word_tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text)


# --- language

_LONGEST = 10_000  # characters per document used for language identification
LIKELY = 0.65  # minimum probability of a language
NO_LANGUAGE = "zxx"  # ISO 639-2 code for numbers, markup and the like


class Language(BaseFilter):
    """Keep documents in some languages, by py3langid, whose package includes its model.

    The language is recorded in every document. datatrove's own filter downloads fastText's model.
    Probabilities of the languages are added, because similar ones such as zh and yue share theirs.
    """

    name = "🌍 language"

    def __init__(self, languages: Sequence[str] = ("en",), language_threshold: float = LIKELY):
        """Create the filter.

        Args:
            languages: ISO 639-1 codes, or 639-3 if there is none.
            language_threshold: minimum probability that a document is in one of them.

        Raises:
            UserError: the model does not know a language.
        """
        super().__init__()
        self.languages, self.language_threshold = tuple(languages), language_threshold
        for name in languages:
            require_language(name)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        scores = note_language(doc)
        probability = sum(scores[name] for name in self.languages)
        return probability > self.language_threshold or (False, doc.metadata["language"])


class ByLanguage(BaseFilter):
    """Filter with separate options for some languages, which ignores all other languages.

    Ignored documents are counted by language. Text without an identifiable language is judged like
    the rule's own languages.
    """

    name = "🌍 by language"

    def __init__(
        self, common: BaseFilter, languages: Sequence[str], by_language: Mapping[str, BaseFilter]
    ):
        """Create the filter.

        Args:
            common: filter of `languages`.
            languages: languages; () for all.
            by_language: filters of languages with separate options.

        Raises:
            UserError: a language is unknown.
        """
        super().__init__()
        for name in (*languages, *by_language):
            require_language(name)
        self.common, self.languages, self.by_language = common, languages, dict(by_language)
        for one in (common, *by_language.values()):
            one.stats = self.stats  # show their counts with the rule

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        likely = likely_languages(doc)
        for language in likely:
            if language in self.by_language:
                return self.by_language[language].filter(doc)
            if language in self.languages:
                return self.common.filter(doc)
        if not self.languages or not likely or NO_LANGUAGE in likely:
            return self.common.filter(doc)
        self.stat_update(f"not judged: {likely[0]}")
        return True


def require_language(name: str) -> None:
    """Raise UserError unless the model knows a language."""
    if name not in known_languages():
        raise UserError(f"unknown language {name!r}{nearest(name, known_languages())}")


@cache
def known_languages() -> tuple[str, ...]:
    """Return the languages that the model knows."""
    return tuple(sorted(map(str, _identifier().labels)))


def likely_languages(document: Document) -> list[str]:
    """Return the fewest languages, at most three, that are likely together, or [].

    Similar languages such as zh, yue and lzh share their probability.
    """
    language, score = (document.metadata.get(name) for name in ("language", "language_score"))
    if isinstance(score, float) and 1 >= score >= LIKELY and language in known_languages():
        return [language]  # recorded earlier, here or by the document's source
    scores = note_language(document)
    best = heapq.nlargest(3, scores, key=lambda name: scores[name])
    sums = itertools.accumulate(scores[name] for name in best)
    return next((best[: n + 1] for n, together in enumerate(sums) if together >= LIKELY), [])


def note_language(document: Document) -> dict[str, float]:
    """Record the language of a document in it; return the probabilities of all languages."""
    ranked = _identifier().rank(document.text[:_LONGEST])
    scores = {str(language): float(score) for language, score in ranked}
    best = max(scores, key=lambda name: scores[name])
    document.metadata |= {"language": best, "language_score": round(scores[best], 4)}
    return scores


@cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


# --- personal data


class PersonalData(PIIFormatter):
    """Mask e-mail and public IP addresses, phone and card numbers and IBANs.

    Phone numbers are found by libphonenumber; those without a separator or + are not masked. Card
    numbers and IBANs need a valid check digit.
    """

    def __init__(
        self,
        kinds: Sequence[str] = ("email", "ip", "iban", "card", "phone"),
        regions: Sequence[str] = ("US", "GB"),
        mask: str = "<{kind}>",
    ):
        """Create the block.

        Args:
            kinds: kinds to mask.
            regions: countries whose phone numbers are found without country code.
            mask: replacement, in which {kind} is one of `kinds`.

        Raises:
            UserError: a kind or region is unknown.
        """
        super().__init__("email" in kinds, "ip" in kinds)
        finders: dict[str, Callable[[str], Iterator[Span]]] = {
            "iban": find_ibans,
            "card": find_cards,
            "phone": partial(find_phones, regions=regions),
        }
        for kind in kinds:
            if kind not in (known := ("email", "ip", *finders)):
                raise UserError(f"unknown kind {kind!r}{nearest(kind, known)}")
        for region in regions:
            if region not in phonenumbers.SUPPORTED_REGIONS:
                raise UserError(f"unknown region {region!r}: expected two letters, such as US")
        self._mask = mask
        self._finders = {kind: find for kind, find in finders.items() if kind in kinds}
        for kind, replacer in (("email", self.emails_replacer), ("ip", self.ip_replacer)):
            replacer.replacements = (self._masked(kind),)
            replacer.validator = partial(self._is_counted, kind)
        self.emails_replacer.regex, self.ip_replacer.regex = EMAIL, IP

    def _masked(self, kind: str) -> str:
        return self._mask.replace("{kind}", kind)

    def _is_counted(self, kind: str, match: str) -> bool:
        if kind == "ip" and not is_public(match):
            return False
        self.stat_update(f"masked_{kind}")
        return True

    def format(self, text: str) -> str:
        if self.remove_emails and "@" in text:
            text = NEAR_AT.sub(lambda match: self.emails_replacer.replace(match.group()), text)
        if self.remove_ips:
            text = self.ip_replacer.replace(text)
        for kind, find in self._finders.items():
            parts, end = [], 0
            for start, stop in find(text):
                self.stat_update(f"masked_{kind}")
                parts += [text[end:start], self._masked(kind)]
                end = stop
            text = "".join([*parts, text[end:]])
        return text


# --- unwanted words


class BannedWords(C4BadWordsFilter):
    """Remove documents with a word or phrase from a file (one per line), ignoring case."""

    def __init__(self, words: str):
        """Read the file.

        Args:
            words: path of the file.

        Raises:
            UserError: the file is missing or empty.
        """
        super().__init__()
        self._pattern = words_pattern(read_words(Path(words)))

    @staticmethod
    def digest_of(words: str, **options: object) -> str:
        """Return the digest of the file."""
        try:
            return hashlib.sha256(Path(words).read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"no word list {words!r}") from error

    def _get_badwords(self, lang: str) -> regex.Pattern:
        return self._pattern
