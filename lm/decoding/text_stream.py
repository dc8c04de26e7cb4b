"""Text of a reply that grows by tokens: what is settled is given out, the rest is held back.

A token costs the same however long the reply is: only the last tokens are decoded again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

from lm.data.tokenizer import Tokenizer

_CONTEXT = 16  # tokens that are decoded before new ones, whose space may depend on them
_REPLACEMENT = "\ufffd"


class TextStream:
    """Text that new tokens add to a prompt, up to the first stop text.

    Held back are a character whose bytes are not complete yet, a run of single bytes that a
    decoder may replace as a whole, and what may become a stop text. All parts together are
    `text_before(stop, text_after(tokenizer, prompt, new))`.

    Attributes:
        stopped: a stop text was found; nothing is added any more.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()):
        """Start after a prompt.

        Args:
            tokenizer: tokenizer of the ids.
            prompt: token ids before the text.
            stop: texts before the first of which it ends; an empty one ends it at once.
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
        self._n_bytes = 0  # single bytes at the end, which are not decoded yet
        self._held = ""
        self.stopped = "" in self._stop

    def push(self, tokens: Iterable[int]) -> str:
        """Add tokens, and return the text that is settled now."""
        for token in tokens:
            if token < self._tokenizer.vocab_size:  # not of a padded vocabulary
                self._tail.append(token)
                self._n_bytes = self._n_bytes + 1 if token in self._byte_ids else 0
        if self.stopped:
            return ""
        self._read(len(self._tail) - self._n_bytes)
        return self._given_out()

    def finish(self) -> str:
        """Return what was held back, at the end of the reply."""
        if self.stopped:
            return ""
        self._read(len(self._tail), at_end=True)
        text = text_before(self._stop, self._held.rstrip(_REPLACEMENT))
        self.stopped, self._held = True, ""
        return text

    def _read(self, n: int, at_end: bool = False) -> None:
        """Decode the tail up to its first `n` tokens, and hold the text that is new."""
        if n <= self._n_read:
            return
        before = self._tokenizer.decode(self._tail[: self._n_read])
        text = self._tokenizer.decode(self._tail[:n])
        if text.endswith(_REPLACEMENT) and not at_end:
            if n - self._n_read <= _CONTEXT:
                return
            # Bytes of a character are at most four: what is before the last four never changes.
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
        # Replaced bytes at the very end of a reply are not shown.
        n_settled = len(text.rstrip(_REPLACEMENT))
        n_settled = min(n_settled, len(text) - _beginning(self._stop, self._longest, text))
        self._held = text[n_settled:]
        return text[:n_settled]


def text_before(stop: Sequence[str], text: str) -> str:
    """Return the text before the first place where one of the stop texts begins."""
    places = [at for at in map(text.find, stop) if at >= 0]
    return text[: min(places)] if places else text


def text_after(tokenizer: Tokenizer, prompt: Sequence[int], new: Sequence[int]) -> str:
    """Return the text that new tokens add to a prompt.

    They are decoded together with it, because a space may depend on the token before. Ids beyond
    the tokenizer's (of a padded vocabulary) are skipped.
    """
    before, known = ([i for i in ids if i < tokenizer.vocab_size] for ids in (prompt, new))
    whole = tokenizer.decode([*before, *known]).rstrip(_REPLACEMENT)
    return whole[len(tokenizer.decode(before)) :]


@lru_cache(maxsize=16)
def byte_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids of single bytes of which a run that is no UTF-8 loses its letters too."""
    found = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in range(256)]
    ids = [i for i in found if i is not None]
    is_run = len(ids) == 256 and "A" not in tokenizer.decode([ids[0x41], ids[0xFF]])
    return frozenset(ids) if is_run else frozenset()


def _beginning(stop: Sequence[str], longest: int, text: str) -> int:
    """Return the length of the longest end of a text with which a stop text begins."""
    lengths = range(min(len(text), longest - 1), 0, -1)
    return next((n for n in lengths if any(s.startswith(text[-n:]) for s in stop)), 0)
