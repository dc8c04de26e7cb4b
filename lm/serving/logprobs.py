"""Log-probabilities of tokens, in both formats of OpenAI's API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm.decoding.engine.requests import STOP, NewToken
from lm.serving.replies import Reply
from lm.serving.served_models import ServedModel

_LEAST = -9999.0  # -inf is not valid JSON


class CompletionLogprobs:
    """Token and log-probability lists of a completion; offsets continue across its parts."""

    def __init__(self, model: ServedModel, is_echo: bool):
        """Start at the beginning of a text.

        Args:
            model: the model.
            is_echo: the text starts with the prompt. Then the end token is listed too, as in
                OpenAI's API: lm-eval expects the last token of the list to be the reply's.
        """
        self._model, self._is_echo, self._offset = model, is_echo, 0

    def as_json(self, reply: Reply) -> dict[str, Any]:
        """Return OpenAI's object for a part of the text."""
        texts, offsets = [], []
        for token in reply.tokens:
            text = self._model.token_text(token.id)
            is_spaced = not self._offset and text[:1] == " " and reply.text[:1] not in ("", " ")
            texts.append(text[1:] if is_spaced else text)  # SentencePiece adds a leading space
            offsets.append(self._offset)
            self._offset += len(texts[-1])
        logprobs = [_finite(token.logprob) for token in reply.tokens]
        tops = [_top(self._model, token) for token in reply.tokens]
        if self._is_echo and reply.finish == STOP:
            ends = self._model.tokenizer.stop_ids
            texts.append(self._model.pieces[ends[0]] if ends else "")
            offsets.append(self._offset)
            logprobs.append(None)
            tops.append(None)
        return {
            "tokens": texts,
            "text_offset": offsets,
            "token_logprobs": logprobs,
            "top_logprobs": tops,
        }


def _top(model: ServedModel, token: NewToken) -> dict[str, float] | None:
    """Return the top tokens by text, including the token itself; None without log-probability."""
    if token.logprob is None:
        return None
    found: dict[str, float] = {}
    for other, logprob in token.top:  # of two with the same text, keep the more likely
        found.setdefault(model.token_text(other), max(_LEAST, logprob))
    found.setdefault(model.token_text(token.id), max(_LEAST, token.logprob))
    return found


def chat_logprobs(model: ServedModel, tokens: Sequence[NewToken]) -> dict[str, Any]:
    """Return OpenAI's object for the tokens of an answer."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        known = token < model.tokenizer.vocab_size
        spelt = model.spelling(token) if known else b""
        return {
            "token": model.token_text(token),
            "logprob": _finite(logprob),
            "bytes": None if spelt is None else list(spelt),
        }

    content = [
        entry(token.id, token.logprob) | {"top_logprobs": [entry(*one) for one in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(_LEAST, logprob)
