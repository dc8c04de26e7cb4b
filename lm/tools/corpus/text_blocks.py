"""Blocks of datatrove that would download a model or a list, with local ones in their place."""

from __future__ import annotations

import hashlib
import heapq
import ipaddress
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from stdnum import iban, luhn

from lm.data.files import read_lines
from lm.errors import UserError, nearest

# Scripts without spaces between words: each character counts as a word.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = regex.compile(
    rf"[{_UNSPACED}]|[[\p{{L}}\p{{M}}\p{{N}}_]--[{_UNSPACED}]]+(?:['’]\p{{L}}+)*|\S",
    regex.V1,
)


class UnicodeWords(WhitespaceTokenizer):
    """Words by Unicode's classes, without a model; sentences as datatrove's fallback has them.

    All instances are equal, so that blocks share datatrove's cache of the words of a text.
    """

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    def __hash__(self) -> int:
        return hash(type(self))

    def word_tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text)


# --- language

_LONGEST = 10_000  # characters of a document by which its language is told
LIKELY = 0.65  # least probability of a language
NO_LANGUAGE = "zxx"  # of numbers, markup and the like, by ISO 639-2


class Language(BaseFilter):
    """Documents in one of some languages, by py3langid, whose package carries its model.

    The language is noted in every document. datatrove's own filter downloads fastText's model. The
    probabilities of several languages are added, because close ones, as zh and yue, share theirs.
    """

    name = "🌍 language"

    def __init__(self, languages: Sequence[str] = ("en",), language_threshold: float = LIKELY):
        """Create the filter.

        Args:
            languages: codes of ISO 639-1, or 639-3 where there is none.
            language_threshold: least probability that a document is in one of them.

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
    """Filter with options of its own for some languages, which leaves further ones alone.

    How many documents of which languages are left alone is counted. Text whose language cannot be
    told, or that is in none, is judged as that of the rule's languages.
    """

    name = "🌍 by language"

    def __init__(
        self, common: BaseFilter, languages: Sequence[str], by_language: Mapping[str, BaseFilter]
    ):
        """Create the filter.

        Args:
            common: filter of `languages`.
            languages: languages; () for all.
            by_language: filter of each language that has another one.

        Raises:
            UserError: a language is unknown.
        """
        super().__init__()
        for name in (*languages, *by_language):
            require_language(name)
        self.common, self.languages, self.by_language = common, languages, dict(by_language)
        for one in (common, *by_language.values()):
            one.stats = self.stats  # counts of theirs are shown with the rule

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
    """Return the fewest languages, at most three, that are likely together; [] if none are.

    Close languages share their probability, as zh, yue and lzh do.
    """
    language, score = (document.metadata.get(name) for name in ("language", "language_score"))
    if isinstance(score, float) and 1 >= score >= LIKELY and language in known_languages():
        return [language]  # as noted before, here or where the document comes from
    scores = note_language(document)
    best = heapq.nlargest(3, scores, key=lambda name: scores[name])
    sums = itertools.accumulate(scores[name] for name in best)
    return next((best[: n + 1] for n, together in enumerate(sums) if together >= LIKELY), [])


def note_language(document: Document) -> dict[str, float]:
    """Note the language of a document in it; return the probabilities of all."""
    ranked = _identifier().rank(document.text[:_LONGEST])
    scores = {str(language): float(score) for language, score in ranked}
    best = max(scores, key=lambda name: scores[name])
    document.metadata |= {"language": best, "language_score": round(scores[best], 4)}
    return scores


@cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


# --- personal data

Span = tuple[int, int]

# Where an e-mail address may be: datatrove's own pattern takes quadratic time on long base64.
_NEAR_AT = regex.compile(r"[^\s@]{0,64}@[^\s@]{1,255}")
# datatrove's pattern with letters of all scripts (RFC 6531) but those without spaces between words,
# where an address would take the words beside it along.
_ALNUM = rf"[[\w]--[_{_UNSPACED}]]"
_ATOM = rf"[[\w!#$%&'*+/=?^`{{|}}~\-]--[{_UNSPACED}]]+"
_LABEL = rf"{_ALNUM}(?:(?:{_ALNUM}|-)*{_ALNUM})?"
_EMAIL = regex.compile(
    rf"{_ATOM}(?:\.{_ATOM})*@(?:(?:{_LABEL}\.)+{_LABEL}|\[(?:\d{{1,3}}\.){{3}}\d{{1,3}}\])",
    regex.V1,
)
_IP = regex.compile(
    r"(?<![\w.:-])(?:(?:\d{1,3}\.){3}\d{1,3}(?!\.?\w)|(?:[0-9a-fA-F]{0,4}:){2,7}[0-9a-fA-F]{0,4}(?![\w:]))"
)
_IBAN = regex.compile(r"\b[A-Z]{2}\d{2}(?:[ -]?[A-Z0-9]{1,4}){3,8}\b")
_CARD = regex.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-])")
# First digits and numbers of digits of Visa, Mastercard, American Express, Diners, Discover, JCB.
_ISSUER = regex.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|5[1-5]\d{14}|2[2-7]\d{14}|3[47]\d{13}|3[068]\d{12}|6(?:011|5\d\d)\d{12}|35\d{14}"
)
_MANY_DIGITS = regex.compile(r"\d(?:[^\d\n]{0,3}\d){6}")
_SEPARATOR = regex.compile(r"[^\d]")
_LINE = regex.compile(r"[^\n]+")


class PersonalData(PIIFormatter):
    """Mask e-mail and public IP addresses, phone and card numbers and IBANs.

    Phone numbers are found by libphonenumber, those without a separator or + left as they are;
    card numbers and IBANs need a correct check digit.
    """

    def __init__(
        self,
        kinds: Sequence[str] = ("email", "ip", "iban", "card", "phone"),
        regions: Sequence[str] = ("US", "GB"),
        mask: str = "<{kind}>",
    ):
        """Create the block.

        Args:
            kinds: what is masked.
            regions: countries whose phone numbers are found without their country code.
            mask: text in its place, {kind} being one of `kinds`.

        Raises:
            UserError: a kind or region is unknown.
        """
        super().__init__("email" in kinds, "ip" in kinds)
        finders: dict[str, Callable[[str], Iterator[Span]]] = {
            "iban": _ibans,
            "card": _cards,
            "phone": partial(_phones, regions=regions),
        }
        for kind in kinds:
            if kind not in (known := ("email", "ip", *finders)):
                raise UserError(f"unknown kind {kind!r}{nearest(kind, known)}")
        for region in regions:
            if region not in phonenumbers.SUPPORTED_REGIONS:
                raise UserError(f"unknown region {region!r}: two letters, such as US")
        self._mask = mask
        self._finders = {kind: find for kind, find in finders.items() if kind in kinds}
        for kind, replacer in (("email", self.emails_replacer), ("ip", self.ip_replacer)):
            replacer.replacements = (self._masked(kind),)
            replacer.validator = partial(self._is_counted, kind)
        self.emails_replacer.regex, self.ip_replacer.regex = _EMAIL, _IP

    def _masked(self, kind: str) -> str:
        return self._mask.replace("{kind}", kind)

    def _is_counted(self, kind: str, match: str) -> bool:
        if kind == "ip" and not _is_public(match):
            return False
        self.stat_update(f"masked_{kind}")
        return True

    def format(self, text: str) -> str:
        if self.remove_emails and "@" in text:
            text = _NEAR_AT.sub(lambda match: self.emails_replacer.replace(match.group()), text)
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


def _is_public(address: str) -> bool:
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    return ip.is_global and (ip.version == 4 or address[0] in "23")  # 2000::/3


def _ibans(text: str) -> Iterator[Span]:
    for match in _IBAN.finditer(text):
        # A word in capitals after the number looks like a part of it.
        ends = [match.start() + gap.start() for gap in regex.finditer(r"[ -]", match.group())]
        for end in (match.end(), *reversed(ends)):
            if iban.is_valid(text[match.start() : end]):
                yield match.start(), end
                break


def _cards(text: str) -> Iterator[Span]:
    for match in _CARD.finditer(text):
        digits = _SEPARATOR.sub("", match.group())
        if _ISSUER.fullmatch(digits) and luhn.is_valid(digits):
            yield match.span()


def _phones(text: str, regions: Sequence[str]) -> Iterator[Span]:
    for line in _LINE.finditer(text):  # by line: the matcher gives up after 65,535 tries
        if not _MANY_DIGITS.search(line.group()):
            continue
        found = [
            (line.start() + match.start, line.start() + match.end)
            for region in regions or (None,)
            for match in phonenumbers.PhoneNumberMatcher(line.group(), region)
            if _SEPARATOR.search(match.raw_string)
        ]
        end = 0
        for start, stop in sorted(found):
            if start >= end:
                yield start, stop
                end = stop


# --- words that are not wanted


class BannedWords(C4BadWordsFilter):
    """Remove documents with a word or phrase of a file, one a line, in upper or lower case."""

    def __init__(self, words: str):
        """Read the file.

        Args:
            words: path of the file.

        Raises:
            UserError: the file is missing, or holds no word.
        """
        super().__init__()
        path = Path(words)
        if not path.is_file():
            raise UserError(f"no file of words {words!r}")
        found = sorted({line.strip().lower() for line in read_lines(path)} - {""})
        if not found:
            raise UserError(f"{path}: holds no word")
        self._pattern = _any_of(found)

    @staticmethod
    def digest_of(words: str, **options: object) -> str:
        """Return the digest of the file."""
        try:
            return hashlib.sha256(Path(words).read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"no file of words {words!r}") from error

    def _get_badwords(self, lang: str) -> regex.Pattern:
        return self._pattern


def _any_of(words: Iterable[str]) -> regex.Pattern:
    """Return the pattern of whole words; those of scripts without spaces are found anywhere."""
    unspaced = regex.compile(f"[{_UNSPACED}]")
    whole = [word for word in words if not unspaced.search(word)]
    anywhere = [word for word in words if unspaced.search(word)]
    return regex.compile(
        r"(?<!\w)\L<whole>(?!\w)|\L<anywhere>", whole=whole or ["\0"], anywhere=anywhere or ["\0"]
    )
