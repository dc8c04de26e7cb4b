"""Engine thread: receives requests from the event loop, and returns their progress."""

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


class EngineLostError(RuntimeError):
    """Failure of an engine that could not be replaced."""


class _LostEngine:
    """Placeholder for an engine that cannot be recreated; rejects all requests."""

    def __init__(self, context: int | None, statistics: EngineStatistics):
        self.context, self._statistics = context, statistics

    def add(self, request: GenerationRequest) -> int:
        raise EngineLostError("the engine has failed, and cannot be restarted")

    def cancel(self, number: int) -> None:
        pass

    def step(self) -> list[Progress]:
        return []

    def update(self, params: Params) -> None:
        raise EngineLostError("the engine has failed, and cannot be restarted")

    def statistics(self) -> EngineStatistics:
        return self._statistics


class Ticket:
    """Requests submitted together, and their progress."""

    def __init__(self, thread: EngineThread, n: int):
        self._thread = thread
        self._open = set(range(n))
        self._events: asyncio.Queue[tuple[int, Progress] | Failure] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Progress]]:
        """Yield (request index, progress) until all requests have ended.

        Raises:
            UserError: a request was rejected.
            RuntimeError: the engine has failed.
        """
        while self._open:
            event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            index, progress = event
            if index in self._open:
                if progress.finish:
                    self._open.remove(index)
                yield event

    def cancel(self, index: int) -> None:
        """Cancel a request; no more progress is returned for it."""
        if index in self._open:
            self._open.remove(index)
            self._thread.cancel(self, index)

    def close(self) -> None:
        """Cancel all unfinished requests."""
        for index in list(self._open):
            self.cancel(index)

    def deliver(self, event: tuple[int, Progress] | Failure) -> None:
        """Deliver an event, in the event loop."""
        self._events.put_nowait(event)


class EngineThread:
    """Engine in its own thread; the methods are called from the event loop.

    If the engine raises an exception, its requests fail and a new engine replaces it; if that fails
    too, requests raise `EngineLostError`.

    Attributes:
        is_lost: the engine has failed and could not be replaced.
        statistics: latest statistics of the engine.
    """

    def __init__(
        self,
        make: Callable[[Experiment, Params], Engine],
        experiment: Experiment,
        params: Params,
        name: str,
        log: Callable[[str], Any],
    ):
        """Create the engine, and start the thread.

        Args:
            make: creates an engine.
            experiment: experiment on a mesh.
            params: parameters.
            name: name of the model, for the log.
            log: called with lines for the operator.
        """
        self._make, self._name, self._log = partial(make, experiment), name, log
        self._params = params
        self._engine: Engine = self._make(params)
        self.is_lost = False
        self.context = self._engine.context
        self.statistics: EngineStatistics = self._engine.statistics()
        self._earlier = [0, 0, 0]  # counters of failed engines
        self._loop = asyncio.get_running_loop()
        self._routes: dict[int, tuple[Ticket, int]] = {}
        self._numbers: dict[tuple[Ticket, int], int] = {}
        self._wake = threading.Condition()
        self._commands: list[Callable[[], Any]] = []
        self._stopping = self._is_busy = False
        self._thread = threading.Thread(target=self._run, name=f"engine {name}", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[GenerationRequest]) -> Ticket:
        """Queue requests, and return their ticket."""
        ticket = Ticket(self, len(requests))
        self._command(partial(self._add, ticket, tuple(requests)))
        return ticket

    def cancel(self, ticket: Ticket, index: int) -> None:
        """Cancel a request of a ticket."""
        self._command(partial(self._cancel, ticket, index))

    def update(self, params: Params) -> None:
        """Replace the parameters for requests submitted later."""
        self._command(partial(self._update, params))

    def stop(self) -> None:
        """Stop the thread; running requests are lost."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout=30)

    def _command(self, command: Callable[[], Any]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    # --- engine thread

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._commands or self._is_busy or self._stopping):
                    self._wake.wait()
                if self._stopping:
                    return
                commands, self._commands = self._commands, []
            for act in (*commands, self._step):
                try:
                    act()
                except Exception as error:
                    self._is_busy = False
                    self._fail(error)

    def _step(self) -> None:
        progress = self._engine.step()
        self._is_busy = bool(progress)
        self.statistics = self._counted(self._engine.statistics())
        self._route(progress)

    def _add(self, ticket: Ticket, requests: Sequence[GenerationRequest]) -> None:
        try:
            for index, request in enumerate(requests):
                number = self._engine.add(request)
                self._routes[number] = ticket, index
                self._numbers[ticket, index] = number
        except (UserError, EngineLostError) as error:
            self._send([(ticket, error)])
        except Exception as error:
            self._fail(error, ticket)

    def _update(self, params: Params) -> None:
        self._params = params
        self._engine.update(params)

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

    def _fail(self, error: Exception, *tickets: Ticket) -> None:
        """Replace the failed engine, and notify all requests, including `tickets`."""
        self._log(f"{self._name}: the engine failed and is being restarted: {error!r}")
        self._log("".join(traceback.format_exception(error)))
        traceback.clear_frames(error.__traceback__)  # they hold references to the engine
        tickets = (*tickets, *(ticket for ticket, _ in self._routes.values()))
        self._routes.clear()
        self._numbers.clear()
        s = self.statistics
        self._earlier = [s.n_prompt_tokens, s.n_reused_tokens, s.n_new_tokens]
        del self._engine  # free its cache before creating another
        try:
            self._engine = self._make(self._params)
            self.is_lost = False  # a newer checkpoint may fix it
        except Exception as problem:
            self._log(f"{self._name}: the engine cannot be restarted: {problem!r}")
            self._engine = _LostEngine(self.context, EngineStatistics(*(0, 0, s.n_rows), *[0] * 5))
            self.is_lost = True
        self.statistics = self._counted(self._engine.statistics())
        failure = EngineLostError if self.is_lost else RuntimeError
        self._send(
            [(ticket, failure("the engine has failed")) for ticket in dict.fromkeys(tickets)]
        )

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
