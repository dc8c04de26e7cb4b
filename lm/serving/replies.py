"""Replies of an engine as text: stable parts, with their tokens."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from lm.decoding.engine.requests import STOP, GenerationRequest, NewToken
from lm.decoding.text_stream import TextStream
from lm.serving.engine_thread import Ticket
from lm.serving.served_models import ServedModel

WITHHELD = "content_filter"  # finish reason of a withheld reply


@dataclass
class Reply:
    """Reply, or a part of it.

    Attributes:
        index: index of its request.
        text: its text.
        tokens: its tokens.
        finish: "stop", "length" or "content_filter"; "" while it continues.
    """

    index: int
    text: str = ""
    tokens: list[NewToken] = field(default_factory=list)
    finish: str = ""

    def add(self, part: Reply) -> None:
        """Append the next part."""
        self.text += part.text
        self.tokens += part.tokens
        self.finish = part.finish


async def reply_parts(
    model: ServedModel,
    requests: Sequence[GenerationRequest],
    stop: Sequence[str],
    ticket: Ticket,
) -> AsyncGenerator[Reply]:
    """Yield the parts of replies as they arrive; complete replies if there is a guard.

    Args:
        model: model with an engine.
        requests: the requests.
        stop: texts at which a reply is cut off.
        ticket: ticket with their progress.

    Raises:
        UserError: a request was rejected.
        RuntimeError: the engine has failed.
    """
    if model.guard is None:
        async with aclosing(_parts(model, requests, stop, ticket)) as parts:
            async for part in parts:
                yield part
        return
    replies = await whole_replies(_parts(model, requests, stop, ticket), len(requests))
    withheld = await model.in_worker(model.guard.withholds, [reply.text for reply in replies])
    for reply, is_withheld in zip(replies, withheld, strict=True):
        yield Reply(reply.index, finish=WITHHELD) if is_withheld else reply


async def whole_replies(parts: AsyncGenerator[Reply], n: int) -> list[Reply]:
    """Collect the complete replies to `n` requests."""
    replies = [Reply(index) for index in range(n)]
    async with aclosing(parts) as closing:
        async for part in closing:
            replies[part.index].add(part)
    return replies


async def _parts(
    model: ServedModel,
    requests: Sequence[GenerationRequest],
    stop: Sequence[str],
    ticket: Ticket,
) -> AsyncGenerator[Reply]:
    streams = [
        TextStream(model.tokenizer, () if model.has_source else request.prompt, stop)
        for request in requests
    ]
    async for index, progress in ticket:
        part, stream = Reply(index, finish=progress.finish), streams[index]
        for token in progress.tokens:
            part.text += stream.push((token.id,))
            part.tokens.append(token)
            if stream.stopped:
                part.finish = STOP
                ticket.cancel(index)
                break
        if part.finish:
            part.text += stream.finish()
        yield part
