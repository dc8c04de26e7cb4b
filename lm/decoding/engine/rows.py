"""State of a request in a row of an engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lm.decoding.controls import START
from lm.decoding.engine.requests import GenerationRequest, NewToken


@dataclass
class ServedRow:
    """Request in a row.

    Attributes:
        number: request id.
        request: the request.
        pages: its pages, in order.
        n_read: prompt tokens whose keys and values are written.
        new: reply tokens read from the device.
        n_dispatched: maximum number of reply tokens dispatched.
        n_exact: number of exact pages at the start (see `PagePool`).
        is_stuck: its limits allow no token although the reply is incomplete, so that it must end.
    """

    number: int
    request: GenerationRequest
    pages: list[int]
    n_read: int
    new: list[int] = field(default_factory=list)
    n_dispatched: int = 0
    n_exact: int = 0
    is_stuck: bool = False

    @property
    def is_prefilled(self) -> bool:
        """True if the keys and values of the whole prompt are written."""
        return self.n_read == len(self.request.prompt)

    @property
    def needs_mask(self) -> bool:
        """True if the host determines the allowed next tokens."""
        return bool(self.request.limits or self.request.banned)

    def allowed(self, vocab_size: int) -> np.ndarray:
        """Return the mask [V] of allowed next tokens; the end tokens if no other is allowed."""
        r, allowed = self.request, np.ones(vocab_size, bool)
        if r.limits:
            allowed = r.limits.allowed(vocab_size, np.array([self.new], int), len(self.new))[0]
        written = [START, *self.new]
        for *before, last in r.banned:
            if written[len(written) - len(before) :] == before and last < vocab_size:
                allowed[last] = False
        if len(self.new) < r.min_new_tokens:
            allowed[list(r.end_ids)] = False
        if not allowed.any():
            self.is_stuck = True
            allowed[list(r.end_ids) or [0]] = True
        return allowed


def new_token(request: GenerationRequest, chosen: Any, at: tuple[int, int] | int) -> NewToken:
    """Build a reply token with the log-probabilities that the request asks for.

    Args:
        request: the request.
        chosen: tokens on the host (`row_sampling.Chosen`).
        at: index of the token among them.
    """
    token, n = int(chosen.tokens_B[at]), request.top_logprobs
    if n is None:
        return NewToken(token)
    listed = chosen.listed_BC[at][:n].tolist(), chosen.listed_logprobs_BC[at][:n].tolist()
    return NewToken(token, float(chosen.logprobs_B[at]), tuple(zip(*listed, strict=True)))
