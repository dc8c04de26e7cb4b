"""Completions and chats: OpenAI's JSON responses, complete or streamed."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, replace
from typing import Any

from lm.data.records import BadRow
from lm.decoding.chats import chat_of
from lm.decoding.engine.prompt_scores import prompt_logprobs
from lm.decoding.engine.requests import GenerationRequest, NewToken
from lm.decoding.text_stream import text_after
from lm.models.variables import Params
from lm.serving.logprobs import CompletionLogprobs, chat_logprobs
from lm.serving.replies import Reply, reply_parts, whole_replies
from lm.serving.request_body import ApiError, Body, with_plain_texts, wrong
from lm.serving.sampling_parameters import (
    UNSUPPORTED,
    Asked,
    RequestLimits,
    grammar_limits,
    prompts_ids,
    read_prompts,
    read_sampling,
    read_top_logprobs,
)
from lm.serving.served_models import ServedModel

Json = dict[str, Any]
Answer = Json | AsyncGenerator[Json]
_GRAMMAR_SECONDS = 10.0
_COMPLETION_TOKENS = 16  # default of OpenAI's API


@dataclass
class Usage:
    """Token counts of a request, updated as replies grow."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def as_json(self) -> Json:
        """Return OpenAI's object."""
        both = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": both,
        }


class Exchange:
    """Client request: its model, and information for the log.

    Attributes:
        model: the model; None before it is known.
        name: model name used by the client.
        usage: token counts.
        started: start time (`time.monotonic`).
        texts: prompts and replies, for the log.
        queue: work queue of the model.
        n_reserved: this request's share of it.
        timer: called with the index of a reply and the number of its new tokens, as they arrive.
    """

    def __init__(self) -> None:
        self.model: ServedModel | None = None
        self.name = ""
        self.usage = Usage()
        self.started = time.monotonic()
        self.texts: Json = {}
        self.timer: Any = None
        self.queue: Any = None
        self.n_reserved = 0

    @property
    def context(self) -> int | None:
        """Maximum tokens of a prompt and its reply; None: no limit."""
        return self.model.engine.context if self.model and self.model.engine else None

    def reserve(self, n: int) -> None:
        """Enter the queue of the model, before the first await.

        Args:
            n: number of replies, or groups of texts.

        Raises:
            ApiError: the queue is full.
        """
        self.queue.take(n)
        self.n_reserved += n


async def complete(exchange: Exchange, body: Body, limits: RequestLimits) -> Answer:
    """Handle `/v1/completions`.

    Raises:
        ApiError: a parameter is invalid.
        UserError: the engine rejects a request.
    """
    model = _generator(exchange)
    top_logprobs = read_top_logprobs(body, is_chat=False)
    asked = read_sampling(body, model.controls, limits, _COMPLETION_TOKENS, top_logprobs)
    is_echo, given = body.flag("echo"), body.raw("prompt")
    body.finish(UNSUPPORTED)
    prompts = read_prompts(given)
    if is_echo and model.has_source:
        raise wrong("echo", "echo is not supported for encoder–decoders")
    if not asked.request.max_new_tokens and not is_echo:
        raise wrong("max_tokens", "it must be above 0, unless echo is true")
    if model.has_source and not body.has("temperature"):
        asked = replace(asked, request=replace(asked.request, temperature=0.0))
    exchange.reserve(asked.n_replies(len(prompts), limits))
    asked = _adapted(exchange, model, await _with_grammar(model, asked))
    ids = await model.in_worker(prompts_ids, model, prompts)
    requests = asked.requests(ids, limits, exchange.context)
    exchange.usage.prompt_tokens = sum(map(len, ids))
    exchange.texts["prompt"] = given
    answer = _Completions(exchange, asked, requests, prompts if is_echo else ())
    return answer.events() if asked.stream else await answer.whole()


async def chat(exchange: Exchange, body: Body, limits: RequestLimits) -> Answer:
    """Handle `/v1/chat/completions`.

    Raises:
        ApiError: a parameter is invalid.
        UserError: the engine rejects a request, or the template the messages.
    """
    model = _generator(exchange)
    if model.template is None:
        raise ApiError(400, f"the model {exchange.name} has no chat template", "model")
    top_logprobs = read_top_logprobs(body, is_chat=True)
    asked = read_sampling(body, model.chat_controls, limits, limits.new_tokens, top_logprobs)
    if not asked.request.max_new_tokens:
        raise wrong("max_tokens", "it must be above 0")
    messages, tools = body.raw("messages"), body.raw("tools")
    tool_choice = body.raw("tool_choice") or "auto"
    if tool_choice not in ("auto", "none"):
        raise wrong("tool_choice", "it must be auto or none")
    if tool_choice == "none":
        tools = None
    body.finish(UNSUPPORTED)
    if not isinstance(messages, list):
        raise wrong("messages", "it must be a list of messages")
    try:
        conversation = chat_of({"messages": with_plain_texts(messages), "tools": tools})
    except BadRow as error:
        raise wrong("messages", str(error)) from None
    exchange.reserve(asked.n_replies(1, limits))
    asked = _adapted(exchange, model, await _with_grammar(model, asked))
    asked = replace(asked, stop=(*asked.stop, *model.chat_stops))
    prompt = await model.in_worker(model.chat_ids, conversation)
    requests = asked.requests([prompt], limits, exchange.context)
    exchange.usage.prompt_tokens = len(prompt)
    exchange.texts["messages"] = messages
    answer = _Chat(exchange, asked, requests)
    return answer.events() if asked.stream else await answer.whole()


def _generator(exchange: Exchange) -> ServedModel:
    model = exchange.model
    assert model is not None
    if model.engine is None:
        raise ApiError(400, f"the model {exchange.name} does not generate text", "model")
    return model


async def _with_grammar(model: ServedModel, asked: Asked) -> Asked:
    if asked.grammar is None:
        return asked
    compiled = model.grammar_worker.submit(grammar_limits, model, asked)
    try:
        found = await asyncio.wait_for(asyncio.wrap_future(compiled), _GRAMMAR_SECONDS)
    except TimeoutError:
        problem = f"compiling the grammar took more than {_GRAMMAR_SECONDS:g} s"
        raise wrong("response_format", problem) from None
    return replace(asked, request=replace(asked.request, limits=found))


def _adapted(exchange: Exchange, model: ServedModel, asked: Asked) -> Asked:
    adapter = exchange.name if exchange.name in model.adapter_names else ""
    return replace(asked, request=replace(asked.request, adapter=adapter))


async def _starts(
    model: ServedModel,
    params: Params,
    requests: Sequence[GenerationRequest],
    prompts: Sequence[str | list[int]],
) -> dict[int, tuple[str, list[NewToken]]]:
    """Return text and tokens of each request's prompt, to be echoed in replies.

    The tokenizer's prefix is not part of a prompt given as text.
    """
    found = {}
    scored: dict[tuple[int, ...], list[NewToken]] = {}
    n_replies = len(requests) // len(prompts)
    for index, request in enumerate(requests):
        prompt = prompts[index // n_replies]
        n_before = len(model.tokenizer.template.before) if isinstance(prompt, str) else 0
        tokens: list[NewToken] = []
        if request.top_logprobs is not None:
            if request.prompt not in scored:
                number = model.adapter_number(request.adapter)
                arguments: Any = model.prepared, params, request.prompt, request.top_logprobs
                arguments += model.adapters, number
                scored[request.prompt] = await model.in_worker(prompt_logprobs, *arguments)
            tokens = scored[request.prompt][n_before:]
        if isinstance(prompt, str):
            found[index] = (prompt, tokens)
        else:
            text = await model.in_worker(text_after, model.tokenizer, (), prompt)
            found[index] = (text, tokens)
    return found


class _Completions:
    """JSON response of a completion."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(
        self,
        exchange: Exchange,
        asked: Asked,
        requests: Sequence[GenerationRequest],
        echoed: Sequence[str | list[int]] = (),
    ):
        """Start a response.

        Args:
            exchange: request of the client.
            asked: its parameters.
            requests: engine requests, grouped by prompt.
            echoed: prompts, if replies echo them.
        """
        model = exchange.model
        assert model is not None
        self._model, self._exchange, self._asked = model, exchange, asked
        self._requests, self._echoed = requests, echoed
        self._has_logprobs = asked.request.top_logprobs is not None
        self._logprobs = [CompletionLogprobs(model, bool(echoed)) for _ in requests]
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": exchange.name,
        }

    def choice(self, reply: Reply, is_part: bool, is_first: bool) -> Json:
        """Return the JSON object of a reply or a part of it."""
        logprobs = None
        if self._has_logprobs:
            logprobs = self._logprobs[reply.index].as_json(reply)
        finish = reply.finish or None
        return {"index": reply.index, "text": reply.text, "logprobs": logprobs} | {
            "finish_reason": finish
        }

    async def whole(self) -> Json:
        """Return the response as one object."""
        replies = await whole_replies(self._parts(), len(self._requests))
        self._exchange.texts["replies"] = [reply.text for reply in replies]
        choices = [self.choice(reply, is_part=False, is_first=True) for reply in replies]
        head = {**self._head, "object": self.kind}
        return head | {"choices": choices, "usage": self._exchange.usage.as_json()}

    async def events(self) -> AsyncGenerator[Json]:
        """Yield the objects of a stream."""
        self._head |= {"object": self.chunk_kind}
        self._head |= {"usage": None} if self._asked.with_usage else {}
        begun: set[int] = set()
        texts = [""] * len(self._requests)
        async with aclosing(self._parts()) as parts:
            async for part in parts:
                texts[part.index] += part.text
                has_logprobs = bool(part.tokens) and self._has_logprobs
                if part.text or part.finish or has_logprobs or part.index not in begun:
                    choice = self.choice(part, is_part=True, is_first=part.index not in begun)
                    begun.add(part.index)
                    yield {**self._head, "choices": [choice]}
        self._exchange.texts["replies"] = texts
        if self._asked.with_usage:
            yield {**self._head, "choices": [], "usage": self._exchange.usage.as_json()}

    async def _parts(self) -> AsyncGenerator[Reply]:
        """Yield the parts of the replies: echoed prompts, then new text."""
        model, starts, params = self._model, {}, None
        while params is not model.params:  # repeat if a newer checkpoint was loaded meanwhile
            params = model.params
            if self._echoed:
                starts = await _starts(model, params, self._requests, self._echoed)
        assert model.engine is not None
        self._head["system_fingerprint"] = f"step-{model.step}"
        is_all = not self._requests[0].max_new_tokens
        with closing(model.engine.submit([] if is_all else self._requests)) as ticket:
            for index, (text, tokens) in starts.items():
                yield Reply(index, text, tokens, "length" if is_all else "")
            found = reply_parts(model, self._requests, self._asked.stop, ticket)
            async with aclosing(found) as parts:
                async for part in parts:
                    yield self._counted(part)

    def _counted(self, part: Reply) -> Reply:
        n = len(part.tokens)
        self._exchange.usage.completion_tokens += n
        self._exchange.timer.tick(part.index, n)
        return part


class _Chat(_Completions):
    """JSON response of a chat."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, reply: Reply, is_part: bool, is_first: bool) -> Json:
        """Return the JSON object of a reply or a part of it."""
        message: Json = {"role": "assistant"} if is_first else {}
        message |= {"content": reply.text} if reply.text or not is_part or is_first else {}
        message |= {} if is_part else {"refusal": None}
        logprobs = chat_logprobs(self._model, reply.tokens) if self._has_logprobs else None
        finish = reply.finish or None
        name = "delta" if is_part else "message"
        return {"index": reply.index, name: message, "logprobs": logprobs, "finish_reason": finish}
