"""ASGI application: routes, and middleware around every request.

The middleware handles keys, draining, JSON errors, metrics and logging; a request ends when its
client disconnects or its time is up.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lm.decoding.engine.sizes import is_pageable
from lm.errors import UserError, nearest
from lm.serving.api_keys import ApiKeys
from lm.serving.completion_api import Answer, Exchange, chat, complete
from lm.serving.engine_thread import EngineLostError
from lm.serving.metrics import Metrics
from lm.serving.request_body import ApiError, Body, read_body
from lm.serving.sampling_parameters import RequestLimits
from lm.serving.served_models import ServedModel
from lm.serving.text_scores import about_tokenizer, classify, detokenize, embed, tokenize
from lm.serving.work_queue import WorkQueue

Handler = Callable[[Exchange, Body, RequestLimits], Awaitable[Answer]]
POSTS: dict[str, Handler] = {
    "/v1/completions": complete,
    "/v1/chat/completions": chat,
    "/v1/embeddings": embed,
    "/classify": classify,
    "/tokenize": tokenize,
    "/detokenize": detokenize,
}
_OPEN = ("/", "/healthz", "/readyz", "/metrics")  # paths without authentication
_CLOSED = 499  # nginx's status for a client that disconnected


@dataclass(frozen=True)
class ServerOptions:
    """Limits and logging options of a server.

    Attributes:
        limits: limits of requests.
        queue: maximum replies, and groups of texts, waiting per model in addition to running ones;
            further requests get 429.
        request_seconds: time limit of a request, including waiting.
        body_bytes: maximum body size.
        log_texts: log prompts and replies.
    """

    limits: RequestLimits
    queue: int = 256
    request_seconds: float = 600.0
    body_bytes: int = 4 * 2**20
    log_texts: bool = False


class Server:
    """Served models and state of the server.

    Attributes:
        models: models by name; the first one is the default.
        options: limits.
        keys: client keys; None: no authentication.
        queues: work queue of each model.
        metrics: metrics.
        is_warm: the engines have compiled their programs.
        draining: shutting down; new requests are refused.
        n_active: requests in progress.
    """

    def __init__(
        self, models: Mapping[str, ServedModel], options: ServerOptions, keys: ApiKeys | None
    ):
        self.options, self.keys = options, keys
        self.queues = {model: WorkQueue(model.n_rows + options.queue) for model in models.values()}
        self.metrics = Metrics(self.queues)
        adapted = {name: model for model in models.values() for name in model.adapter_names}
        self.models = {**models, **adapted}
        self.is_warm = self.draining = False
        self.n_active = 0

    def model_of(self, body: Body) -> tuple[str, ServedModel]:
        """Return name and model that a body selects.

        Raises:
            ApiError: the model does not exist.
        """
        name = body.text("model", next(iter(self.models)))
        model = self.models.get(name)
        if model is None:
            near = nearest(name, self.models)
            message = f"unknown model {name[:200]!r}{near}"
            raise ApiError(404, message, "model", "model_not_found")
        return name, model

    @property
    def has_lost_engine(self) -> bool:
        """True if a model can no longer be served."""
        return any(model.engine and model.engine.is_lost for model in self.queues)


def log_line(**values: Any) -> None:
    """Write a JSON log line to stderr."""
    print(json.dumps({"time": round(time.time(), 3), **values}), file=sys.stderr, flush=True)


def log_note(text: str) -> None:
    """Log a note for the operator."""
    log_line(note=text)


def make_app(server: Server, further: list[Route] | None = None) -> ASGIApp:
    """Build the application.

    Args:
        server: the server.
        further: additional routes.
    """

    def healthz(request: Request) -> Response:
        if server.has_lost_engine:
            return PlainTextResponse("an engine has failed and cannot be restarted\n", 503)
        return PlainTextResponse("ok\n")

    def readyz(request: Request) -> Response:
        if server.has_lost_engine:
            return healthz(request)
        if server.draining:
            return PlainTextResponse("draining\n", 503)
        if not server.is_warm:
            return PlainTextResponse("compiling\n", 503)
        return PlainTextResponse("ok\n")

    def metrics(request: Request) -> Response:
        media_type = "text/plain; version=0.0.4"
        return Response(server.metrics.text(), media_type=media_type)

    def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": list(map(_about, server.models.items()))})

    def model(request: Request) -> Response:
        name, found = server.model_of(Body({"model": request.path_params["name"]}))
        return JSONResponse(_about((name, found)))

    def tokenizer_info(request: Request) -> Response:
        named = {"model": request.query_params.get("model")}
        return JSONResponse(about_tokenizer(server.model_of(Body(named))[1]))

    gets = {"/healthz": healthz, "/readyz": readyz, "/metrics": metrics}
    gets |= {"/v1/models": models, "/v1/models/{name:path}": model}
    gets |= {"/tokenizer_info": tokenizer_info}
    routes = [Route(path, get, methods=["GET"]) for path, get in gets.items()]
    handlers: Any = {HTTPException: _http_error, ApiError: _api_error}
    return _Around(Starlette(routes=routes + (further or []), exception_handlers=handlers), server)


def _about(named: tuple[str, ServedModel]) -> dict[str, Any]:
    name, model = named
    context = model.engine.context if model.engine else None
    about = {"id": name, "object": "model", "created": model.created, "owned_by": "lm"}
    about |= {"kind": model.kind, "step": model.step, "max_model_len": context}
    about |= {"paged": is_pageable(model.prepared) if model.engine else None}
    return about | {"chat": model.template is not None, "has_source": model.has_source}


def _http_error(request: Request, error: HTTPException) -> Response:
    response = ApiError(error.status_code, error.detail).response()
    response.headers.update(error.headers or {})  # such as Allow, for a wrong method
    return response


def _api_error(request: Request, error: ApiError) -> Response:
    return error.response()


class _Endpoint:
    """ASGI application for a path with a JSON body."""

    def __init__(self, server: Server, handle: Handler):
        self._server, self._handle = server, handle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        server, exchange = self._server, scope["lm.exchange"]
        body = await read_body(Request(scope, receive), server.options.body_bytes)
        exchange.name, exchange.model = server.model_of(body)
        exchange.queue = server.queues[exchange.model]
        exchange.timer = server.metrics.timer(exchange.name, exchange.started)
        work = self._answer(exchange, body, scope, receive, send)
        try:
            await _until_gone(receive, work, server.options.request_seconds)
        finally:
            exchange.queue.give_back(exchange.n_reserved)

    async def _answer(
        self, exchange: Exchange, body: Body, scope: Scope, receive: Receive, send: Send
    ) -> None:
        try:
            answer = await self._handle(exchange, body, self._server.options.limits)
        except UserError as error:
            raise ApiError(400, str(error)) from None
        if isinstance(answer, dict):
            await JSONResponse(answer)(scope, receive, send)
            return
        async with aclosing(answer) as events:
            try:  # an error before the first event gets its own status
                first = await anext(events)
            except UserError as error:
                raise ApiError(400, str(error)) from None
            await _send_events(send, first, events)


async def _send_events(send: Send, first: Any, events: AsyncGenerator[Any]) -> None:
    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
    headers += [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await _send_event(send, first)
    async for event in events:
        await _send_event(send, event)
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def _send_event(send: Send, event: Any) -> None:
    data = json.dumps(event, ensure_ascii=False).encode()
    message = {"type": "http.response.body", "body": b"data: " + data + b"\n\n"}
    await send(message | {"more_body": True})


async def _until_gone(receive: Receive, work: Coroutine[Any, Any, None], seconds: float) -> None:
    """Run to completion; cancel if the client disconnects or time is up.

    Raises:
        ClientDisconnect: the client has disconnected.
        ApiError: the time is up.
    """

    async def wait_for_end() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(work), asyncio.create_task(wait_for_end())]
    try:
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
        elif tasks[1].done():
            raise ClientDisconnect
        else:
            raise ApiError(408, f"the request took more than {seconds:g} s", code="timeout")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Around:
    """Middleware for keys, draining, errors, metrics and logging."""

    def __init__(self, app: ASGIApp, server: Server):
        self._app, self._server = app, server
        self._posts = {path: _Endpoint(server, handle) for path, handle in POSTS.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        server, path = self._server, scope["path"]
        exchange = scope["lm.exchange"] = Exchange()
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        if path in POSTS:
            server.n_active += 1
            server.metrics.begin()
        problem = ""
        try:
            self._admit(scope)
            # Not left to Starlette, which would format these errors differently.
            await self._posts.get(path, self._app)(scope, receive, sending)
        except ClientDisconnect:
            status, problem = _CLOSED, "the client disconnected"
        except Exception as error:
            problem = await self._tell(error, status, scope, receive, sending)
        finally:
            if path in POSTS:
                server.n_active -= 1
                seconds = time.monotonic() - exchange.started
                server.metrics.end(path, status, exchange.name, seconds)
                self._log(path, status, seconds, exchange, problem)

    def _admit(self, scope: Scope) -> None:
        """Raise ApiError for a request without a valid key, or while draining."""
        server, path = self._server, scope["path"]
        if server.keys is not None and path not in _OPEN:
            headers = dict(scope["headers"])
            if not server.keys.allows(headers.get(b"authorization", b"")):
                raise ApiError(401, "the key is missing or unknown", code="invalid_api_key")
        if path in POSTS and scope["method"] != "POST":
            raise ApiError(405, f"{path} takes POST")
        if server.draining and path in POSTS:
            raise ApiError(503, "the server is shutting down; use another one", code="draining")

    async def _tell(
        self, error: Exception, status: int, scope: Scope, receive: Receive, send: Send
    ) -> str:
        """Send an error to the client, and return the text for the log."""
        if isinstance(error, EngineLostError):
            error = ApiError(503, str(error), code="engine_lost")
        if not isinstance(error, ApiError):
            log_line(error="".join(traceback.format_exception(error)))
            error = ApiError(500, "internal server error; see the server's log")
        with suppress(Exception):
            async with asyncio.timeout(1):
                if not status:
                    await error.response()(scope, receive, send)
                else:  # in the middle of a stream
                    await _send_event(send, error.body())
                    await send({"type": "http.response.body", "body": b""})
        return str(error)

    def _log(
        self, path: str, status: int, seconds: float, exchange: Exchange, problem: str
    ) -> None:
        usage = exchange.usage
        values = {"path": path, "status": status, "model": exchange.name}
        values |= {"seconds": round(seconds, 4), "prompt_tokens": usage.prompt_tokens}
        values |= {"new_tokens": usage.completion_tokens}
        values |= {"problem": problem} if problem else {}
        log_line(**values, **(exchange.texts if self._server.options.log_texts else {}))


async def warm_up(server: Server) -> None:
    """Compile what requests need; afterwards the server is ready."""
    for model in dict.fromkeys(server.models.values()):
        await model.warm_up(log_note)
    server.is_warm = True


async def reload_models(server: Server) -> None:
    """Switch all models to newer checkpoints, if any."""
    for model in dict.fromkeys(server.models.values()):
        await model.reload(log_note)
