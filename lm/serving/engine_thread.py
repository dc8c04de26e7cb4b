"""Thread of an engine: takes requests from the event loop, and gives their progress back."""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

from lm.decoding.engine.requests import (
    Engine,
    EngineStatistics,
    GenerationRequest,
    Progress,
)
from lm.errors import UserError
from lm.experiment import Experiment
from lm.models.variables import Params

Failure = UserError | RuntimeError


class Ticket:
    """Requests that were submitted together, and their progress as it comes."""

    def __init__(self, thread: EngineThread, n: int):
        self._thread = thread
        self._open = set(range(n))
        self._events: asyncio.Queue[tuple[int, Progress] | Failure] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Progress]]:
        """Yield the index of a request and its progress, until all have ended.

        Raises:
            UserError: a request was refused.
            RuntimeError: the engine has failed.
        """
        while self._open:
            event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            index, progress = event
            if index in self._open:
                if progress.finish:
                    self._end(index)
                yield event

    def cancel(self, index: int) -> None:
        """End a request; nothing more of it is given."""
        if index in self._open:
            self._end(index)
            self._thread.cancel(self, index)

    def close(self) -> None:
        """End all requests that have not ended."""
        for index in list(self._open):
            self.cancel(index)

    def _end(self, index: int) -> None:
        self._thread.n_open -= 1
        self._open.remove(index)

    def deliver(self, event: tuple[int, Progress] | Failure) -> None:
        """Take an event, in the event loop."""
        self._events.put_nowait(event)


class EngineThread:
    """Engine in a thread of its own; its methods are called in the event loop.

    An exception of the engine ends the requests that it had, and a new engine takes its place.

    Attributes:
        n_open: requests that wait or run.
        statistics: the newest of the engine.
    """

    def __init__(
        self,
        make: Callable[[Experiment, Params], Engine],
        experiment: Experiment,
        params: Params,
        name: str,
        log: Callable[[str], Any],
    ):
        """Make the engine, and start the thread.

        Args:
            make: makes an engine.
            experiment: experiment on a mesh.
            params: its parameters.
            name: name of the model, for the log.
            log: receives lines for the operator.
        """
        self._make, self._name, self._log = partial(make, experiment), name, log
        self._params = params
        self._engine = self._make(params)
        self.n_open = 0
        self.context = self._engine.context
        self.statistics: EngineStatistics = self._engine.statistics()
        self._earlier = [0, 0, 0]  # counters of engines that have failed
        self._loop = asyncio.get_running_loop()
        self._routes: dict[int, tuple[Ticket, int]] = {}
        self._numbers: dict[tuple[Ticket, int], int] = {}
        self._wake = threading.Condition()
        self._commands: list[Callable[[], Any]] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"engine {name}", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[GenerationRequest]) -> Ticket:
        """Queue requests, and return what gives their progress."""
        ticket = Ticket(self, len(requests))
        self.n_open += len(requests)
        self._command(partial(self._add, ticket, tuple(requests)))
        return ticket

    def cancel(self, ticket: Ticket, index: int) -> None:
        """End a request of a ticket."""
        self._command(partial(self._cancel, ticket, index))

    async def call(self, function: Callable[[Engine], Any]) -> Any:
        """Run a function of the engine in its thread, between two steps, and return its result."""
        future: asyncio.Future[Any] = self._loop.create_future()

        def run() -> None:
            try:
                result, error = function(self._engine), None
            except Exception as found:
                result, error = None, found
            self._loop.call_soon_threadsafe(_resolve, future, result, error)

        self._command(run)
        return await future

    async def update(self, params: Params) -> None:
        """Replace the parameters; requests that run are ended with the old ones."""
        await self.call(lambda engine: engine.update(params))
        self._params = params

    def stop(self) -> None:
        """End the thread; requests that run are lost."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout=30)

    def _command(self, command: Callable[[], Any]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    # --- in the thread

    def _run(self) -> None:
        is_busy = False
        while True:
            with self._wake:
                while not (self._commands or is_busy or self._stopping):
                    self._wake.wait()
                if self._stopping:
                    return
                commands, self._commands = self._commands, []
            for command in commands:
                command()
            try:
                progress = self._engine.step()
                is_busy = bool(progress)
                self.statistics = self._counted(self._engine.statistics())
                self._route(progress)
            except Exception as error:
                is_busy = False
                self._fail(error)

    def _add(self, ticket: Ticket, requests: Sequence[GenerationRequest]) -> None:
        try:
            for index, request in enumerate(requests):
                number = self._engine.add(request)
                self._routes[number] = ticket, index
                self._numbers[ticket, index] = number
        except UserError as error:
            self._send([(ticket, error)])
        except Exception as error:
            self._fail(error)
            self._send([(ticket, RuntimeError("the engine has failed"))])

    def _cancel(self, ticket: Ticket, index: int) -> None:
        number = self._numbers.pop((ticket, index), None)
        if number is not None:
            del self._routes[number]
            self._engine.cancel(number)

    def _route(self, progress: Sequence[Progress]) -> None:
        events: list[tuple[Ticket, Any]] = []
        for one in progress:
            route = self._routes.get(one.request)
            if route is None:
                continue
            events.append((route[0], (route[1], one)))
            if one.finish:
                del self._numbers[self._routes.pop(one.request)]
        self._send(events)

    def _send(self, events: list[tuple[Ticket, Any]]) -> None:
        if events:
            self._loop.call_soon_threadsafe(_deliver, events)

    def _fail(self, error: Exception) -> None:
        self._log(f"{self._name}: the engine has failed and starts again: {error!r}")
        self._log("".join(traceback.format_exception(error)))
        tickets = dict.fromkeys(ticket for ticket, _ in self._routes.values())
        self._routes.clear()
        self._numbers.clear()
        self._send([(ticket, RuntimeError("the engine has failed")) for ticket in tickets])
        s = self.statistics
        self._earlier = [s.n_prompt_tokens, s.n_reused_tokens, s.n_new_tokens]
        del self._engine  # its cache, before there is another
        self._engine = self._make(self._params)
        self.statistics = self._counted(self._engine.statistics())

    def _counted(self, s: EngineStatistics) -> EngineStatistics:
        """Return statistics since the start of the server."""
        prompt, reused, new = self._earlier
        return EngineStatistics(
            *(s.n_running, s.n_waiting, s.n_rows, s.n_pages, s.n_pages_used),
            *(s.n_prompt_tokens + prompt, s.n_reused_tokens + reused, s.n_new_tokens + new),
        )


def _deliver(events: list[tuple[Ticket, Any]]) -> None:
    for ticket, event in events:
        ticket.deliver(event)


def _resolve(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.cancelled():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
