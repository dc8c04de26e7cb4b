"""Detection of personal data: e-mail and public IP addresses, phone and card numbers, IBANs.

`lm corpus` masks them; the safety set `samples` counts them in generated text.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import phonenumbers
import regex
from stdnum import iban, luhn

from lm.data.unwanted_words import UNSPACED

Span = tuple[int, int]
KINDS = ("email", "ip", "iban", "card", "phone")

# Candidates for e-mail addresses: datatrove's own pattern takes quadratic time on long base64.
NEAR_AT = regex.compile(r"[^\s@]{0,64}@[^\s@]{1,255}")
# datatrove's pattern, with letters of all scripts (RFC 6531) except those written without spaces,
# where a match would include neighboring words.
_ALNUM = rf"[[\w]--[_{UNSPACED}]]"
_ATOM = rf"[[\w!#$%&'*+/=?^`{{|}}~\-]--[{UNSPACED}]]+"
_LABEL = rf"{_ALNUM}(?:(?:{_ALNUM}|-)*{_ALNUM})?"
EMAIL = regex.compile(
    rf"{_ATOM}(?:\.{_ATOM})*@(?:(?:{_LABEL}\.)+{_LABEL}|\[(?:\d{{1,3}}\.){{3}}\d{{1,3}}\])",
    regex.V1,
)
IP = regex.compile(
    r"(?<![\w.:-])(?:(?:\d{1,3}\.){3}\d{1,3}(?!\.?\w)|(?:[0-9a-fA-F]{0,4}:){2,7}[0-9a-fA-F]{0,4}(?![\w:]))"
)
_IBAN = regex.compile(r"\b[A-Z]{2}\d{2}(?:[ -]?[A-Z0-9]{1,4}){3,8}\b")
_CARD = regex.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-])")
# First digits and lengths of Visa, Mastercard, American Express, Diners, Discover and JCB numbers.
_ISSUER = regex.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|5[1-5]\d{14}|2[2-7]\d{14}|3[47]\d{13}|3[068]\d{12}|6(?:011|5\d\d)\d{12}|35\d{14}"
)
_MANY_DIGITS = regex.compile(r"\d(?:[^\d\n]{0,3}\d){6}")
_SEPARATOR = regex.compile(r"[^\d]")
_LINE = regex.compile(r"[^\n]+")


def personal_data(text: str, regions: Sequence[str] = ("US", "GB")) -> set[str]:
    """Return the kinds of personal data in a text: email, ip, iban, card, phone.

    Args:
        text: the text.
        regions: countries whose phone numbers are found without country code.
    """
    finders: dict[str, Callable[[], Iterator[Any]]] = {
        "email": lambda: (m for near in NEAR_AT.findall(text) for m in EMAIL.finditer(near)),
        "ip": lambda: (m for m in IP.finditer(text) if is_public(m.group())),
        "iban": partial(find_ibans, text),
        "card": partial(find_cards, text),
        "phone": partial(find_phones, text, regions),
    }
    return {kind for kind, find in finders.items() if next(iter(find()), None) is not None}


def is_public(address: str) -> bool:
    """Return whether a text is a globally reachable IP address."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    return ip.is_global and (ip.version == 4 or address[0] in "23")  # 2000::/3


def find_ibans(text: str) -> Iterator[Span]:
    """Yield the spans of IBANs with a valid check digit."""
    for match in _IBAN.finditer(text):
        # A capitalized word after the number looks like a part of it.
        ends = [match.start() + gap.start() for gap in regex.finditer(r"[ -]", match.group())]
        for end in (match.end(), *reversed(ends)):
            if iban.is_valid(text[match.start() : end]):
                yield match.start(), end
                break


def find_cards(text: str) -> Iterator[Span]:
    """Yield the spans of card numbers with a valid check digit."""
    for match in _CARD.finditer(text):
        digits = _SEPARATOR.sub("", match.group())
        if _ISSUER.fullmatch(digits) and luhn.is_valid(digits):
            yield match.span()


def find_phones(text: str, regions: Sequence[str]) -> Iterator[Span]:
    """Yield the spans of phone numbers that libphonenumber finds for these countries."""
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
