"""Requests of an engine, the tokens that it returns, and the interface of all engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from lm.decoding.text_limits import TextLimits
from lm.models.variables import Params

MOST_LOGPROBS = 20  # likeliest tokens that can be listed at a place
STOP, LENGTH, CANCELLED = "stop", "length", "cancelled"  # reasons that a row ended


@dataclass(frozen=True)
class GenerationRequest:
    """Token ids to continue, and how.

    A reply to a request with a seed depends on nothing else that is served. Sampling applies the
    penalties, the bias, the limits, the temperature, top-k, top-p and min-p in this order.

    Attributes:
        prompt: token ids of the prompt; of the source of an encoder–decoder.
        max_new_tokens: most new tokens.
        temperature: divisor of the logits; 0 takes the most likely token.
        top_k: sample from the k most likely tokens; 0: from all.
        top_p: sample from the smallest set of tokens whose probability reaches p.
        min_p: least probability of a token, as a part of that of the most likely one.
        seed: seed of the sample; None: the engine draws one.
        number: number of the sample among those of its seed, part of the random key.
        repetition_penalty: divisor of the logits of tokens that are in the reply
            (`Controls.repetition_penalty`).
        presence_penalty: subtracted from the logits of tokens that are in the reply.
        frequency_penalty: subtracted for each time that a token is in the reply.
        logit_bias: added to the logits, by token id.
        min_new_tokens: tokens before an end token is allowed.
        end_ids: tokens each of which ends the reply.
        banned: sequences of token ids that are never written.
        limits: limits of the text of the reply, such as a grammar.
        top_logprobs: number of likeliest tokens to list at each place; None: no log-probabilities.
        adapter: name of the low-rank adapter; "" for the base.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    number: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_new_tokens: int = 0
    end_ids: tuple[int, ...] = ()
    banned: tuple[tuple[int, ...], ...] = ()
    limits: TextLimits | None = None
    top_logprobs: int | None = None
    adapter: str = ""


@dataclass(frozen=True)
class NewToken:
    """Token of a reply.

    Attributes:
        id: its id.
        logprob: its log-probability before temperature and filters; None if not asked for.
        top: the likeliest tokens at its place and their log-probabilities, likeliest first.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Progress:
    """New tokens of a reply from one step, and whether it ended.

    Attributes:
        request: number of the request, as `Engine.add` returned it.
        tokens: new tokens, in order; an end token is not among them.
        finish: "stop" after an end token, "length", "cancelled"; "" while the reply goes on.
    """

    request: int
    tokens: tuple[NewToken, ...] = ()
    finish: str = ""


@dataclass(frozen=True)
class EngineStatistics:
    """Counters and sizes of an engine since its start, for logs and metrics.

    Attributes:
        n_running: requests in rows.
        n_waiting: requests that wait for a row or for pages.
        n_rows: most requests that run at once.
        n_pages: pages of the key/value cache; 0 of an engine without pages.
        n_pages_used: pages that running requests hold.
        n_prompt_tokens: tokens of prompts so far.
        n_reused_tokens: those of them that were in the cache.
        n_new_tokens: tokens of replies so far.
    """

    n_running: int
    n_waiting: int
    n_rows: int
    n_pages: int
    n_pages_used: int
    n_prompt_tokens: int
    n_reused_tokens: int
    n_new_tokens: int


class Engine(Protocol):
    """Interface of the engines; none of the methods may be called from two threads at once."""

    @property
    def context(self) -> int | None:
        """Most tokens of a prompt and its reply together; None: any number."""
        ...

    def add(self, request: GenerationRequest) -> int:
        """Queue a request, and return its number.

        Raises:
            UserError: the prompt is empty or too long, or an id or an adapter is unknown.
        """
        ...

    def cancel(self, number: int) -> None:
        """End a request; one that has ended is ignored. No more progress of it is returned."""
        ...

    def step(self) -> list[Progress]:
        """Run until some request has progress, and return it; [] if there is none to run."""
        ...

    def update(self, params: Params) -> None:
        """Replace the parameters of later requests, which wait until all earlier ones end."""
        ...

    def statistics(self) -> EngineStatistics:
        """Return counters and sizes."""
        ...
