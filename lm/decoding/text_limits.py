r"""Constraints on generated text: allowed words, a banned pattern, a grammar or JSON schema.

Each one is an llguidance grammar, which gives the tokens that may follow those of a row. The
compiled loops of sampling and beam search call it on the host before each token.

Shape letters: B rows, T maximum new tokens, V vocabulary.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.config.registry import listed
from lm.data.files import read_text
from lm.data.tokenizer import Tokenizer
from lm.data.tokenizers.basic import ByteTokenizer
from lm.data.tokenizers.hf import BYTE_CHARACTERS
from lm.data.unspaced_scripts import UNSPACED
from lm.errors import UserError, missing_package
from lm.storage import parse_json

KEYS = ("allowed", "banned_pattern", "grammar")  # in section `decode`
_MOST_STATES = 2048  # maximum cached matchers, keyed by generated ids
_LEAST = np.float32(-1e30)  # score of the end token where no other token is allowed
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_JSON: Any = {"whitespace_pattern": r"[ \n]?"}  # unlimited white space might never end
_ANYTHING = "(?s:.*)"


@dataclass(frozen=True)
class TextLimits:
    """Constraints on the text of a row; equal ones share their compiled programs.

    Attributes:
        grammars: llguidance grammars, all of which the text must match.
        end_ids: end tokens.
        digest: digest of the tokenizer.
        tokenizer: the tokenizer.
    """

    grammars: tuple[str, ...]
    end_ids: tuple[int, ...]
    digest: str
    tokenizer: Tokenizer = field(compare=False, repr=False)
    _states: OrderedDict[tuple[int, ...], list[Any]] = field(
        default_factory=OrderedDict, compare=False, repr=False
    )
    _lock: Any = field(default_factory=Lock, compare=False, repr=False)

    def without_grammars(self) -> TextLimits:
        """Return the tokenizer-specific part, used as a cache key."""
        return TextLimits((), self.end_ids, self.digest, self.tokenizer)

    def compiled(self) -> TextLimits:
        """Return itself after compiling the matchers for an empty text, which is slow."""
        self._matchers(())
        return self

    def masked(self, scores_BV: jax.Array, written_BT: jax.Array, n: jax.Array) -> jax.Array:
        """Mask the scores of tokens that may not follow the `n` written ones with -inf.

        A row that nothing may follow ends.
        """
        B, V = scores_BV.shape
        shape = jax.ShapeDtypeStruct((B, V), np.bool_)
        allowed_BV = jax.pure_callback(partial(self.allowed, V), shape, written_BT, n)
        found_BV = jnp.where(allowed_BV, scores_BV, -jnp.inf)
        is_stuck_B1 = (found_BV == -jnp.inf).all(-1, keepdims=True)
        is_end_V = np.isin(np.arange(V), self.end_ids)
        return jnp.where(is_stuck_B1 & is_end_V, jnp.maximum(scores_BV, _LEAST), found_BV)

    def allowed(self, n_ids: int, written_BT: Any, n: Any) -> np.ndarray:
        """Return which tokens may follow the first `n` of each row, bool [B, n_ids]."""
        rows = np.asarray(written_BT)[:, : int(n)].tolist()
        with self._lock:
            return np.stack([self._row(n_ids, tuple(row)) for row in rows])

    def _row(self, n_ids: int, ids: tuple[int, ...]) -> np.ndarray:
        if not set(ids).isdisjoint(self.end_ids):
            return np.ones(n_ids, bool)  # the row has ended
        allowed = np.ones(n_ids, bool)
        for matcher in self._matchers(ids):
            bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            own = np.zeros(n_ids, bool)
            known = np.unpackbits(bits, bitorder="little")[:n_ids].astype(bool)
            own[: len(known)] = known
            end = _vocabulary(self.without_grammars()).eos_token
            own[list(self.end_ids)] = end < len(known) and known[end]
            # After an error, such as a grammar that is too complex, nothing is allowed.
            allowed &= own & (not matcher.is_error())
        return allowed

    def _matchers(self, ids: tuple[int, ...]) -> list[Any]:
        """Return the matchers after some tokens."""
        found = self._states.get(ids)
        if found is None:
            before = self._states.get(ids[:-1]) if ids else None
            if before is None:
                before, new = (
                    [_matcher(self.without_grammars(), grammar) for grammar in self.grammars],
                    ids,
                )
            else:
                new = ids[-1:]
            found = [matcher.deep_copy() for matcher in before]
            for matcher in found:
                matcher.consume_tokens(list(new))
            self._states[ids] = found
            if len(self._states) > _MOST_STATES:
                self._states.popitem(last=False)
        self._states.move_to_end(ids)
        return found


def text_limits(decode: Any, tokenizer: Tokenizer, end_ids: tuple[int, ...]) -> TextLimits | None:
    """Return the constraints in section `decode` of a configuration, or None.

    Raises:
        UserError: a constraint is invalid, or llguidance is not installed.
    """
    if not any(decode[key] for key in KEYS):
        return None
    if decode.grammar and not end_ids:
        raise UserError("--config.decode.grammar: the run's tokenizer has no end token")
    _require_llguidance()
    shown = {key: f"--config.decode.{key}={decode[key]}" for key in KEYS}
    grammars = {shown[key]: grammar for key, grammar in _grammars(decode)}
    return _checked(grammars, tokenizer, end_ids)


def with_grammar(
    limits: TextLimits | None,
    kind: str,
    source: str,
    tokenizer: Tokenizer,
    end_ids: tuple[int, ...],
) -> TextLimits:
    """Add a grammar to constraints.

    Args:
        limits: existing constraints, or None.
        kind: "json" (a JSON schema), "lark" or "regex".
        source: text of the grammar.
        tokenizer: tokenizer of the texts.
        end_ids: end tokens.

    Raises:
        UserError: the grammar is invalid, or llguidance is not installed.
    """
    if not end_ids:
        raise UserError("a grammar needs an end token, which the run's tokenizer lacks")
    _require_llguidance()
    found = _checked({"the grammar": _grammar_of(kind, source)}, tokenizer, end_ids)
    both = (*(limits.grammars if limits else ()), *found.grammars)
    return TextLimits(both, end_ids, tokenizer.digest, tokenizer).compiled()


def _require_llguidance() -> None:
    try:
        import llguidance  # noqa: F401
    except ImportError as error:
        raise missing_package("a decoding constraint", "llguidance", "grammar") from error


def _checked(
    grammars: Mapping[str, str], tokenizer: Tokenizer, end_ids: tuple[int, ...]
) -> TextLimits:
    """Build constraints from named grammars; UserError if one is invalid."""
    from llguidance import LLMatcher

    limits = TextLimits(tuple(grammars.values()), end_ids, tokenizer.digest, tokenizer)
    vocabulary = _vocabulary(limits.without_grammars())
    for name, grammar in grammars.items():
        if problem := LLMatcher.validate_grammar(grammar, vocabulary):
            lines = [line.strip() for line in problem.splitlines() if line.strip()]
            said = "; ".join(dict.fromkeys([lines[0], *(x for x in lines if "error:" in x)]))
            raise UserError(f"{name}: {said}")
    return limits


def _grammars(decode: Any) -> Iterator[tuple[str, str]]:
    """Yield (key, grammar) for each constraint."""
    from llguidance import LLMatcher

    if decode.allowed:
        yield "allowed", LLMatcher.grammar_from_regex(_words_alone(listed(decode.allowed)))
    if decode.banned_pattern:
        pattern = re.sub(r"(?<!\\)/", r"\/", decode.banned_pattern).replace("\n", r"\n")
        anywhere = f"/{_ANYTHING}/ & ~/{_ANYTHING}({pattern}){_ANYTHING}/"
        yield "banned_pattern", f"start: TEXT\nTEXT: {anywhere}\n"
    if decode.grammar:
        yield "grammar", _stated_grammar(decode.grammar)


def _stated_grammar(spec: str) -> str:
    kind, _, argument = spec.partition(":")
    if kind == "regex" and argument:
        return _grammar_of(kind, argument)
    if kind not in ("json", "lark") or not argument:
        raise UserError(
            f"--config.decode.grammar={spec}: write json:FILE (a JSON schema), lark:FILE or "
            "regex:PATTERN"
        )
    if not Path(argument).is_file():
        raise UserError(f"--config.decode.grammar={spec}: no file {argument}")
    text = "".join(read_text(Path(argument)))
    if kind == "json":
        parse_json(text, argument)
    return _grammar_of(kind, text)


def _grammar_of(kind: str, source: str) -> str:
    """Convert a JSON schema, Lark grammar or pattern to an llguidance grammar."""
    from llguidance import LLMatcher

    if kind == "regex":
        return LLMatcher.grammar_from_regex(source)
    if kind == "json":
        return LLMatcher.grammar_from_json_schema(source, defaults=_JSON)
    return LLMatcher.grammar_from_lark(source)


def _words_alone(words: Sequence[str]) -> str:
    r"""Return a pattern for texts of allowed words, with anything but words between them.

    In scripts without spaces, nothing is needed between words.
    """
    kinds: dict[bool, list[str]] = {False: [], True: []}
    for word in words:
        kinds[bool(UNSPACED.search(word))].append(_escaped(word))
    if not words:
        raise UserError("--config.decode.allowed: no words given")
    between = "|".join([r"\W", *kinds[True]])
    spaced = f"(?i:{'|'.join(kinds[False])})"
    if not kinds[False]:
        return f"({between})*"
    return f"({between})*({spaced}(({between})+{spaced})*({between})*)?"


def _escaped(word: str) -> str:
    return re.sub(r"([^\w\s])", r"\\\1", word)


# --- vocabularies


def token_bytes(tokenizer: Tokenizer) -> list[bytes | None]:
    """Return the bytes that each token adds to a text; None if it adds none."""
    return list(map(spelling(tokenizer), range(tokenizer.vocab_size)))


def spelling(tokenizer: Tokenizer) -> Callable[[int], bytes | None]:
    """Return a function from a token id to the bytes it adds to a text (None: none).

    Tokens are decoded after another one, because a leading space may depend on that.
    """
    if isinstance(tokenizer, ByteTokenizer):
        return lambda i: bytes([i]) if i < 256 else None
    special = {tokenizer.bos_id, tokenizer.token_id("<unk>"), *tokenizer.stop_ids}
    byte_of = {letter: byte for byte, letter in enumerate(BYTE_CHARACTERS)}
    first = next((i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]).isalpha()), None)
    before = [] if first is None else [first]
    start, pieces = tokenizer.decode(before), tokenizer.pieces()

    def of_token(i: int) -> bytes | None:
        text, piece = tokenizer.decode([*before, i]), pieces[i]
        if i in special or text == start:
            return None
        if text.startswith(start) and "\ufffd" not in text:
            return text[len(start) :].encode()
        if found := _BYTE.fullmatch(piece):
            return bytes([int(found[1], 16)])
        return bytes(map(byte_of.__getitem__, piece)) if byte_of.keys() >= set(piece) else None

    return of_token


class _Vocabulary:
    """Vocabulary in llguidance's form; if there is no end token, one is added after the last id."""

    bos_token_id = None

    def __init__(self, limits: TextLimits):
        tokenizer, end_ids = limits.tokenizer, limits.end_ids
        found = list(_spellings(replace(limits, end_ids=())))
        found += [None] * (max([len(found), *end_ids]) + 1 - len(found))
        self.eos_token_id = end_ids[0] if end_ids else len(found) - 1
        self.special_token_ids = [i for i, text in enumerate(found) if text is None]
        self.tokens = [f"<|{i}|>".encode() if x is None else x for i, x in enumerate(found)]
        self._tokenizer = tokenizer
        self._ids = {text: i for i, text in enumerate(found) if text}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: str | bytes) -> list[int]:
        """Return tokens that spell a text exactly: the tokenizer's own if possible, else greedily.

        Llama's tokenizer, for one, adds a space at the start of a text.
        """
        spelt = text if isinstance(text, bytes) else text.encode()
        for before in ("", "\x02"):
            n_before = len(self._tokenizer.encode(before))
            whole = before + spelt.decode(errors="replace")
            ids = self._tokenizer.encode(whole).tolist()[n_before:]
            if b"".join(self.tokens[i] for i in ids) == spelt:
                return ids
        ids, at = [], 0
        while at < len(spelt):
            ends = range(min(len(spelt), at + self._longest), at, -1)
            end = next((end for end in ends if spelt[at:end] in self._ids), None)
            if end is None:
                break  # no token starts like this
            ids.append(self._ids[spelt[at:end]])
            at = end
        return ids


@lru_cache(maxsize=8)
def _spellings(limits: TextLimits) -> tuple[bytes | None, ...]:
    return tuple(token_bytes(limits.tokenizer))


@lru_cache(maxsize=8)
def _vocabulary(limits: TextLimits) -> Any:
    from llguidance import LLTokenizer, TokenizerWrapper

    own = _Vocabulary(limits)
    return LLTokenizer(TokenizerWrapper(own), n_vocab=len(own.tokens), eos_token=own.eos_token_id)


@lru_cache(maxsize=64)
def _matcher(limits: TextLimits, grammar: str) -> Any:
    """Return a matcher of an empty text; it is copied before it consumes a token."""
    from llguidance import LLMatcher

    return LLMatcher(_vocabulary(limits), grammar, log_level=0)
