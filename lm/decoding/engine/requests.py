"""Engine interface: requests, returned tokens, and methods of all engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from lm.decoding.text_limits import TextLimits
from lm.models.variables import Params

MOST_LOGPROBS = 20  # maximum number of top tokens listed per position
STOP, LENGTH, CANCELLED = "stop", "length", "cancelled"  # finish reasons


@dataclass(frozen=True)
class GenerationRequest:
    """Token ids to continue, with sampling parameters.

    The reply to a request with a seed does not depend on other requests. Sampling applies
    penalties, bias, limits, temperature, top-k, top-p and min-p in this order.

    Attributes:
        prompt: token ids of the prompt, or of an encoder–decoder's source.
        max_new_tokens: maximum new tokens.
        temperature: divisor of the logits; 0 is greedy.
        top_k: sample from the k most likely tokens; 0: all.
        top_p: sample from the smallest set of tokens with total probability at least p.
        min_p: minimum probability of a token, relative to the most likely one.
        seed: seed of the sample; None: drawn by the engine.
        number: index of the sample among those with this seed; part of the random key.
        repetition_penalty: divisor of the logits of tokens in the reply
            (`Controls.repetition_penalty`).
        presence_penalty: subtracted from the logits of tokens in the reply.
        frequency_penalty: subtracted from logits for each occurrence in the reply.
        logit_bias: added to the logits, by token id.
        min_new_tokens: minimum new tokens before an end token is allowed.
        end_ids: end tokens.
        banned: sequences of token ids that are never generated.
        limits: constraints on the text of the reply, such as a grammar.
        top_logprobs: number of top tokens to list per position; None: no log-probabilities.
        adapter: name of the low-rank adapter; "": base model.
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
        id: token id.
        logprob: log-probability before temperature and filters; None if not requested.
        top: most likely tokens at this position with log-probabilities, in descending order.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Progress:
    """New tokens of a reply from one step, and whether it has ended.

    Attributes:
        request: request id returned by `Engine.add`.
        tokens: new tokens in order, without an end token.
        finish: "stop" (end token), "length" or "cancelled"; "" while the reply continues.
    """

    request: int
    tokens: tuple[NewToken, ...] = ()
    finish: str = ""


@dataclass(frozen=True)
class EngineStatistics:
    """Counters and sizes of an engine since its start, for logs and metrics.

    Attributes:
        n_running: requests in rows.
        n_waiting: requests waiting for a row or pages.
        n_rows: maximum number of concurrent requests.
        n_pages: pages of the key/value cache; 0 for an engine without pages.
        n_pages_used: pages held by running requests.
        n_prompt_tokens: prompt tokens so far.
        n_reused_tokens: prompt tokens found in the cache so far.
        n_new_tokens: generated tokens so far.
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
    """Interface of the engines. Not thread-safe."""

    @property
    def context(self) -> int | None:
        """Maximum tokens of a prompt and its reply together; None: no limit."""
        ...

    def add(self, request: GenerationRequest) -> int:
        """Queue a request, and return its id.

        Raises:
            UserError: the prompt is empty or too long, or a token id or adapter is unknown.
        """
        ...

    def cancel(self, number: int) -> None:
        """Cancel a request, if it has not ended; no more progress is returned for it."""
        ...

    def step(self) -> list[Progress]:
        """Run until some request makes progress, and return it; [] if no requests are left."""
        ...

    def update(self, params: Params) -> None:
        """Replace the parameters for later requests, which wait for all earlier ones."""
        ...

    def statistics(self) -> EngineStatistics:
        """Return counters and sizes."""
        ...
