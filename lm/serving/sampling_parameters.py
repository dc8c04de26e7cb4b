"""Parameters of completions and chats, converted to engine requests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lm.decoding.controls import Controls
from lm.decoding.engine.requests import MOST_LOGPROBS, GenerationRequest
from lm.decoding.prompts import check_ids
from lm.decoding.text_limits import TextLimits, with_grammar
from lm.serving.request_body import ApiError, Body, is_ids, wrong
from lm.serving.served_models import ServedModel

UNSUPPORTED = (
    *("audio", "function_call", "functions", "modalities", "prediction", "reasoning_effort"),
    *("suffix", "use_beam_search", "web_search_options"),
)
_MOST_STOPS = 16
_HUGE = 2**63 - 1


@dataclass(frozen=True)
class RequestLimits:
    """Limits of requests.

    Attributes:
        prompt_tokens: maximum tokens of a prompt.
        new_tokens: maximum new tokens of a reply.
        choices: maximum replies per request.
    """

    prompt_tokens: int
    new_tokens: int
    choices: int


@dataclass(frozen=True)
class Grammar:
    """Requested grammar: "json", "lark" or "regex", and its source."""

    kind: str
    source: str


@dataclass(frozen=True)
class Asked:
    """Parameters of a completion or chat, without its prompts.

    Attributes:
        request: request without a prompt.
        grammar: grammar of the reply, not yet part of the request.
        n: replies per prompt.
        stop: texts at which a reply is cut off.
        stream: stream the reply.
        with_usage: send token counts at the end of a stream.
    """

    request: GenerationRequest
    grammar: Grammar | None
    n: int
    stop: tuple[str, ...]
    stream: bool
    with_usage: bool

    def n_replies(self, n_prompts: int, limits: RequestLimits) -> int:
        """Return the total number of replies; ApiError if there are too many."""
        n = n_prompts * self.n
        if n > limits.choices:
            raise ApiError(400, f"{n} replies: at most {limits.choices}")
        return n

    def requests(
        self, prompts: Sequence[Sequence[int]], limits: RequestLimits, context: int | None
    ) -> list[GenerationRequest]:
        """Return the requests of prompts, grouped by prompt.

        Args:
            prompts: token ids of each prompt.
            limits: limits of requests.
            context: maximum tokens of a prompt and its reply; None: no limit.

        Raises:
            ApiError: a prompt is empty or too long.
        """
        room = limits.prompt_tokens if context is None else context
        most = min(limits.prompt_tokens, room - bool(self.request.max_new_tokens))
        for prompt in prompts:
            if not prompt:
                raise ApiError(
                    400, "the prompt is empty, and the tokenizer has no start token", "prompt"
                )
            if len(prompt) > most:
                raise ApiError(
                    400,
                    f"the prompt has {len(prompt)} tokens; the maximum is {most}",
                    "prompt",
                    "context_length_exceeded",
                )
        return [
            replace(self.request, prompt=tuple(prompt), number=number)
            for prompt in prompts
            for number in range(self.n)
        ]


def read_sampling(
    body: Body,
    controls: Controls,
    limits: RequestLimits,
    default_tokens: int,
    top_logprobs: int | None,
) -> Asked:
    """Parse the sampling parameters of a body.

    Args:
        body: body of the request.
        controls: constraints of the model's configuration.
        limits: limits of requests.
        default_tokens: default maximum of new tokens.
        top_logprobs: number of top tokens to list; None: no log-probabilities.

    Raises:
        ApiError: a parameter is invalid.
    """
    most_tokens = limits.new_tokens
    n_tokens = body.integer("max_tokens", min(default_tokens, most_tokens), 0, most_tokens)
    n_tokens = body.integer("max_completion_tokens", n_tokens, 1, most_tokens)
    n = body.integer("n", 1, 1, limits.choices)
    if body.integer("best_of", n, 1, limits.choices) != n:
        raise wrong("best_of", "it must equal n")
    seed = body.integer("seed", -1, -_HUGE - 1, _HUGE) if body.has("seed") else None
    further_ends = body.ids("stop_token_ids", 8)
    ends = () if body.flag("ignore_eos") else controls.end_ids
    stream, options = body.flag("stream"), Body(body.object("stream_options"))
    with_usage = options.flag("include_usage")
    options.flag("include_obfuscation")
    options.finish()
    request = GenerationRequest(
        (),
        n_tokens,
        temperature=body.number("temperature", 1, 0, 100),
        top_k=max(0, body.integer("top_k", 0, -1, _HUGE)),
        top_p=body.number("top_p", 1, 0, 1),
        min_p=body.number("min_p", 0, 0, 1),
        seed=None if seed is None else seed % 2**63,
        repetition_penalty=body.number(
            "repetition_penalty", controls.repetition_penalty, 0.01, 100
        ),
        presence_penalty=body.number("presence_penalty", 0, -2, 2),
        frequency_penalty=body.number("frequency_penalty", 0, -2, 2),
        logit_bias=_read_bias(body),
        min_new_tokens=body.integer("min_tokens", controls.min_length, 0, most_tokens),
        end_ids=(*ends, *further_ends),
        banned=controls.banned,
        limits=controls.limits,
        top_logprobs=top_logprobs,
    )
    stop = tuple(body.texts("stop", _MOST_STOPS))
    return Asked(request, _read_grammar(body), n, stop, stream, with_usage)


def _read_bias(body: Body) -> dict[int, float]:
    found = {}
    for name, value in body.object("logit_bias").items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (name.isascii() and name.isdigit() and len(name) < 10) or not is_number:
            raise wrong("logit_bias", "it must map token ids to numbers")
        if not -100 <= value <= 100:
            raise wrong("logit_bias", "its numbers must be from -100 to 100")
        found[int(name)] = float(value)
    return found


def _read_grammar(body: Body) -> Grammar | None:
    """Parse the grammar in `response_format`: OpenAI's types, "regex" or "lark"."""
    form = Body(body.object("response_format"))
    kind = form.text("type", "text")
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar("json", '{"type": "object"}')
    if kind == "json_schema":
        schema = form.object("json_schema").get("schema")
        if not isinstance(schema, dict):
            raise wrong("response_format", "json_schema.schema must be an object")
        return Grammar("json", json.dumps(schema))
    if kind not in ("regex", "lark"):
        raise wrong("response_format", "type: text, json_object, json_schema, regex or lark")
    source = form.text(kind)
    if not source:
        raise wrong("response_format", f"{kind} is empty")
    return Grammar(kind, source)


def grammar_limits(model: ServedModel, asked: Asked) -> TextLimits:
    """Return the constraints of a request including its grammar; UserError if invalid."""
    request, grammar = asked.request, asked.grammar
    assert grammar is not None
    of_grammar = grammar.kind, grammar.source, model.tokenizer
    return with_grammar(request.limits, *of_grammar, request.end_ids)


def read_top_logprobs(body: Body, is_chat: bool) -> int | None:
    """Parse the number of top tokens to list per position; None: no log-probabilities."""
    if not is_chat:
        n = body.integer("logprobs", -1, 0, MOST_LOGPROBS)
        return None if n < 0 else n
    n = body.integer("top_logprobs", 0, 0, MOST_LOGPROBS)
    if body.flag("logprobs"):
        return n
    if body.has("top_logprobs"):
        raise wrong("top_logprobs", "it needs logprobs=true")
    return None


def read_prompts(value: Any) -> list[str | list[int]]:
    """Parse the prompts of a body: a text, token ids, or a list of either.

    Raises:
        ApiError: it is something else.
    """
    if isinstance(value, str) or (is_ids(value) and value):
        value = [value]
    if not isinstance(value, list) or not value:
        raise wrong("prompt", "it must be a text, token ids, or a list of either")
    if not all(isinstance(one, str) or is_ids(one) for one in value):
        raise wrong("prompt", "it must be a text, token ids, or a list of either")
    return value


def prompts_ids(model: ServedModel, prompts: Sequence[str | list[int]]) -> list[list[int]]:
    """Tokenize prompts; UserError for an unknown id or a source that is too long."""
    found = [model.prompt_ids(one) if isinstance(one, str) else one for one in prompts]
    check_ids(found, model.experiment.model)
    model.check_sources(found)
    return found
