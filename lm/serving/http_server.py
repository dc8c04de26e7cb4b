"""Server process: socket, signals, reloads, and graceful shutdown."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import uvicorn

from lm.errors import UserError
from lm.serving.api_keys import ApiKeys
from lm.serving.app import Server, ServerOptions, log_note, make_app, reload_models, warm_up
from lm.serving.playground import playground_routes
from lm.serving.served_models import ServedModel

_KEEP_ALIVE = 30  # seconds of an idle connection


@dataclass(frozen=True)
class ListenOptions:
    """Address and files of a server, and its timeouts.

    Attributes:
        host: address or name.
        port: TCP port; 0: a free one.
        certificate: file with TLS certificates; "": no TLS.
        key: file with the private key; "": it is in the certificate file.
        api_keys: file with client keys; "": no authentication.
        drain_seconds: time for running requests at shutdown.
        reload_seconds: interval between checks for newer checkpoints; 0: only on SIGHUP.
    """

    host: str
    port: int
    certificate: str = ""
    key: str = ""
    api_keys: str = ""
    drain_seconds: float = 600.0
    reload_seconds: float = 0.0


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers, which are ours."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(
    load: Callable[[], list[ServedModel]], options: ServerOptions, listen: ListenOptions
) -> None:
    """Serve models until SIGTERM or Ctrl-C, then finish running requests and return.

    Args:
        load: loads the models, in the event loop.
        options: limits.
        listen: address, files and timeouts.

    Raises:
        UserError: a model cannot be loaded, or the address, a key or a certificate is invalid.
    """
    keys = ApiKeys(Path(listen.api_keys), log_note) if listen.api_keys else None
    _check_certificate(listen)
    with _socket(listen.host, listen.port) as listener, _lasting_stderr():
        asyncio.run(_serve(load, options, listen, keys, listener))


async def _serve(
    load: Callable[[], list[ServedModel]],
    options: ServerOptions,
    listen: ListenOptions,
    keys: ApiKeys | None,
    listener: socket.socket,
) -> None:
    loop = asyncio.get_running_loop()
    reload_wanted = asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, reload_wanted.set)  # also while models are loading
    models = {model.name: model for model in load()}
    server = Server(models, options, keys)
    config = uvicorn.Config(
        make_app(server, further=playground_routes()),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=1,  # all requests have been answered by then
        ssl_certfile=listen.certificate or None,
        ssl_keyfile=listen.key or None,
    )
    process = _Uvicorn(config)
    tasks: set[asyncio.Task[Any]] = set()

    def start(work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    def end() -> None:
        if server.draining:
            process.should_exit = True
        else:
            start(_drain(server, process, listen.drain_seconds))

    async def reload() -> None:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(reload_wanted.wait(), listen.reload_seconds or None)
            reload_wanted.clear()
            await reload_models(server)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    start(reload())
    start(warm_up(server))
    _announce(server, listen, listener)
    try:
        await process.serve(sockets=[listener])
    finally:
        for task in tasks:
            task.cancel()
        for model in models.values():
            model.close()


async def _drain(server: Server, process: _Uvicorn, seconds: float) -> None:
    """Refuse new requests, wait for running ones, and let the process exit."""
    server.draining = True
    log_note(f"shutting down; requests in progress: {server.n_active}")
    until = time.monotonic() + seconds
    while server.n_active and time.monotonic() < until:
        await asyncio.sleep(0.02)
    process.should_exit = True


def _check_certificate(listen: ListenOptions) -> None:
    if listen.certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(listen.certificate, listen.key or None, password="")
        except OSError as error:  # includes ssl.SSLError
            where = f"{listen.certificate} {listen.key}".strip()
            raise UserError(f"{where}: no usable certificate and key: {error}") from None


def _announce(server: Server, listen: ListenOptions, listener: socket.socket) -> None:
    scheme = "https" if listen.certificate else "http"
    host = f"[{listen.host}]" if ":" in listen.host else listen.host
    port = listener.getsockname()[1]
    names = ", ".join(f"{name} (step {model.step})" for name, model in server.models.items())
    print(f"serving {names} on {scheme}://{host}:{port}", file=sys.stderr, flush=True)


class _LastingStream(io.TextIOBase):
    """Text stream that ignores write errors, losing the lines."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()


@contextmanager
def _lasting_stderr() -> Iterator[None]:
    """Ignore write errors on stderr (full disk, closed pipe): only log lines are lost."""
    before = sys.stderr
    with redirect_stderr(_LastingStream(before)):
        yield
    try:
        before.flush()
    except (OSError, ValueError):
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  so that the exit does not fail either


@contextmanager
def _socket(host: str, port: int) -> Iterator[socket.socket]:
    """Open a listening socket; UserError if the address is not available."""
    if port > 65535:
        raise UserError(f"--port {port}: the largest port is 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        listener = socket.create_server(address, family=family, backlog=2048)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port}: {reason}") from None
    with listener:
        yield listener
