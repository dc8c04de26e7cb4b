"""Incremental text of a growing reply: stable text is emitted, the rest is held back.

The cost per token does not depend on the reply's length: only the last tokens are decoded again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

from lm.data.tokenizer import Tokenizer

_CONTEXT = 16  # tokens decoded before new ones, because spaces may depend on them
_REPLACEMENT = "\ufffd"


class TextStream:
    """Text that new tokens add to a prompt, up to the first stop text.

    Held back are incomplete characters, runs of single bytes that a decoder may replace as a whole,
    and possible starts of a stop text. All parts concatenated are
    `text_before(stop, text_after(tokenizer, prompt, new))`.

    Attributes:
        stopped: a stop text was found; no more text is added.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()):
        """Start after a prompt.

        Args:
            tokenizer: tokenizer of the ids.
            prompt: token ids before the text.
            stop: texts at which the text is cut off; an empty one ends it at once.
        """
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._longest = max(map(len, stop), default=0)
        self._byte_ids = byte_ids(tokenizer)
        prompt = [token for token in prompt if token < tokenizer.vocab_size]
        start = max(0, len(prompt) - _CONTEXT)
        while start and prompt[start] in self._byte_ids:
            start -= 1
        self._tail = list(prompt[start:])  # the first `_n_read` of them were decoded
        self._n_read = len(self._tail)
        self._n_bytes = 0  # number of single bytes at the end, not decoded yet
        self._held = ""
        self.stopped = "" in self._stop

    def push(self, tokens: Iterable[int]) -> str:
        """Add tokens, and return the newly stable text."""
        for token in tokens:
            if token < self._tokenizer.vocab_size:  # skip ids of a padded vocabulary
                self._tail.append(token)
                self._n_bytes = self._n_bytes + 1 if token in self._byte_ids else 0
        if self.stopped:
            return ""
        self._read(len(self._tail) - self._n_bytes)
        return self._given_out()

    def finish(self) -> str:
        """Return the held-back text at the end of the reply."""
        if self.stopped:
            return ""
        self._read(len(self._tail), at_end=True)
        text = text_before(self._stop, self._held.rstrip(_REPLACEMENT))
        self.stopped, self._held = True, ""
        return text

    def _read(self, n: int, at_end: bool = False) -> None:
        """Decode the tail up to its first `n` tokens, and hold the new text."""
        if n <= self._n_read:
            return
        before = self._tokenizer.decode(self._tail[: self._n_read])
        text = self._tokenizer.decode(self._tail[:n])
        if text.endswith(_REPLACEMENT) and not at_end:
            if n - self._n_read <= _CONTEXT:
                return
            # A character has at most four bytes: text before the last four never changes.
            shorter = ((m, self._tokenizer.decode(self._tail[:m])) for m in range(n - 4, n - 8, -1))
            n, text = next((m, part) for m, part in shorter if text.startswith(part))
        self._held += text[len(before) :]
        drop = max(0, n - _CONTEXT)
        while drop and self._tail[drop] in self._byte_ids:
            drop -= 1
        del self._tail[:drop]
        self._n_read = n - drop

    def _given_out(self) -> str:
        text = text_before(self._stop, self._held)
        if len(text) < len(self._held):
            self.stopped, self._held = True, ""
            return text
        # Replacement characters at the very end of a reply are not shown.
        n_settled = len(text.rstrip(_REPLACEMENT))
        n_settled = min(n_settled, len(text) - _beginning(self._stop, self._longest, text))
        self._held = text[n_settled:]
        return text[:n_settled]


def text_before(stop: Sequence[str], text: str) -> str:
    """Return the text before the first occurrence of any stop text."""
    places = [at for at in map(text.find, stop) if at >= 0]
    return text[: min(places)] if places else text


def text_after(tokenizer: Tokenizer, prompt: Sequence[int], new: Sequence[int]) -> str:
    """Return the text that new tokens add to a prompt.

    They are decoded together, because a space may depend on the previous token. Ids after the
    tokenizer's last one (of a padded vocabulary) are skipped.
    """
    before, known = ([i for i in ids if i < tokenizer.vocab_size] for ids in (prompt, new))
    whole = tokenizer.decode([*before, *known]).rstrip(_REPLACEMENT)
    return whole[len(tokenizer.decode(before)) :]


@lru_cache(maxsize=16)
def byte_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return single-byte ids for which a decoder replaces an invalid UTF-8 run as a whole."""
    found = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in range(256)]
    ids = [i for i in found if i is not None]
    is_run = len(ids) == 256 and "A" not in tokenizer.decode([ids[0x41], ids[0xFF]])
    return frozenset(ids) if is_run else frozenset()


def _beginning(stop: Sequence[str], longest: int, text: str) -> int:
    """Return the length of the longest suffix of a text that starts a stop text."""
    lengths = range(min(len(text), longest - 1), 0, -1)
    return next((n for n in lengths if any(s.startswith(text[-n:]) for s in stop)), 0)
