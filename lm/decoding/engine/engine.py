"""Paged engine: requests join and leave a running batch at every step.

Each step prefills one chunk of a waiting prompt, if any, and dispatches the next tokens of all
rows; results are read while the device runs the following step. Pages for a whole reply are
reserved when a request gets its row, so that rows are never evicted.

A row whose request has a seed is computed by programs whose shapes never depend on other rows: the
full batch, prompt chunks that start at multiples of the chunk size, shared pages only if written by
these programs. Rows without a seed run in the smallest batch that holds them.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.decoding.engine.adapters import Adapters
from lm.decoding.engine.drafts import prepare_draft
from lm.decoding.engine.option_table import OptionTable
from lm.decoding.engine.pages import PagePool
from lm.decoding.engine.programs import (
    DraftModel,
    NewTokens,
    StateSharding,
    StepRows,
    decode_rows,
    read_chunk,
)
from lm.decoding.engine.prompt_scores import prompt_logprobs
from lm.decoding.engine.requests import (
    LENGTH,
    STOP,
    EngineStatistics,
    GenerationRequest,
    NewToken,
    Progress,
)
from lm.decoding.engine.rows import ServedRow, new_token
from lm.decoding.engine.shapes import allocate_state
from lm.decoding.engine.sizes import (
    EngineOptions,
    batch_sizes,
    choose_context,
    count_pages,
    free_memory,
    make_pages,
    padded_chunk,
    pages_per_row,
    reads_whole,
)
from lm.decoding.engine.speculation import speculate_rows
from lm.decoding.prompts import check_ids, check_prompts
from lm.decoding.weights import prepare
from lm.errors import UserError
from lm.experiment import Experiment
from lm.models.variables import Params


class PagedEngine:
    """Engine for decoders whose token mixers are all attention; implements `Engine`."""

    def __init__(
        self,
        experiment: Experiment,
        params: Params,
        options: EngineOptions,
        names: Sequence[str] = (),
        adapters: Adapters | None = None,
        draft: tuple[Experiment, Params] | None = None,
    ):
        """Allocate the cache.

        Args:
            experiment: experiment on a mesh.
            params: parameters.
            options: sizes.
            names: adapter names, by which requests select them.
            adapters: low-rank adapters of `params`, from index 1 on.
            draft: smaller model with the same tokenizer that proposes `n_proposed` tokens per step;
                None: propose what followed the last tokens earlier in the text.
        """
        self._adapters = adapters
        self._numbers = {name: i for i, name in enumerate(["", *names])}
        self._unprepared, self._options = experiment, options
        self._experiment, self._params = prepare(experiment, params)
        experiment = self._experiment
        self._model = experiment.model
        config: Any = self._model.config  # type: ignore[attr-defined]
        self.context = choose_context(experiment, options)
        self._is_prefix = experiment.objective.has_prefix
        self._reads_whole = reads_whole(experiment)
        self._vocab_size = config.vocab_size
        draft = draft and prepare_draft(*draft, config.vocab_size)
        free = free_memory(experiment.mesh.devices.flat[0])
        n_pages = count_pages(experiment, options, free, draft and draft[0])
        self._pool = PagePool(n_pages, options.page_size)
        self._tables = np.zeros((options.n_rows, pages_per_row(experiment, options)), np.int32)
        self._table = OptionTable(options.n_rows, config.vocab_size)
        self._sharding = StateSharding(experiment.mesh)
        state = allocate_state(experiment, options, n_pages)
        self._draft = None
        if draft is not None:
            self._draft = DraftModel(draft[0].model, draft[1])
            draft_pages = make_pages(draft[0], n_pages, options.page_size)
            state = replace(state, draft_pages=draft_pages)
        self._state = self._sharding.place(state, jax.device_put)
        self._all_allowed = jnp.ones((options.n_rows, config.vocab_size), bool)
        self._rows: dict[int, ServedRow] = {}  # by row index, in order of admission
        self._waiting: deque[tuple[int, GenerationRequest]] = deque()
        self._in_flight: deque[tuple[dict[int, tuple[int, int]], NewTokens]] = deque()
        self._updates: deque[tuple[int, Params]] = (
            deque()
        )  # parameters, by the first request id that uses them
        self._n_requests = self._n_prompt = self._n_reused = self._n_new = 0

    # --- interface `Engine`

    def add(self, request: GenerationRequest) -> int:
        """Queue a request, and return its id."""
        check_prompts([request.prompt], self.context)
        check_ids([request.prompt], self._model)
        self._table.check(request)
        if request.adapter not in self._numbers:
            raise UserError(f"no adapter {request.adapter!r} (known: {', '.join(self._numbers)})")
        limit = min(request.max_new_tokens, self.context - len(request.prompt))
        request = replace(request, max_new_tokens=limit)
        if self._pages_of(request) > self._pool.n_pages:
            raise UserError(
                f"the prompt has {len(request.prompt)} tokens and asks for {limit} more; the cache "
                f"has {self._pool.n_pages} pages of {self._pool.page_size}"
            )
        self._waiting.append((self._n_requests, request))
        self._n_requests += 1
        return self._n_requests - 1

    def cancel(self, number: int) -> None:
        """Cancel a request, if it has not ended."""
        self._waiting = deque(x for x in self._waiting if x[0] != number)
        for slot in [slot for slot, row in self._rows.items() if row.number == number]:
            self._end(slot)

    def step(self) -> list[Progress]:
        """Run until some request makes progress, and return it; [] if no requests are left."""
        while self._rows or self._waiting or self._in_flight:
            self._admit()
            is_reading = self._read_prompt()
            self._dispatch(1 if is_reading else self._options.steps_per_dispatch)
            # One dispatch stays on the device while the host reads the previous one.
            runs_ahead = bool(self._live()) and not self._needs_masks()
            while len(self._in_flight) > runs_ahead:
                if found := self._read():
                    return found
        return []

    def prompt_logprobs(self, request: GenerationRequest) -> list[NewToken]:
        """Return the tokens of a prompt with log-probabilities; None for the first one."""
        n_top, adapter = request.top_logprobs or 0, self._numbers[request.adapter]
        text = self._experiment, self._params, request.prompt
        return prompt_logprobs(*text, n_top, self._adapters, adapter)

    def update(self, params: Params) -> None:
        """Replace the parameters for later requests, which wait for all earlier ones."""
        if self._updates and self._updates[-1][0] == self._n_requests:
            self._updates.pop()
        self._updates.append((self._n_requests, prepare(self._unprepared, params)[1]))

    def statistics(self) -> EngineStatistics:
        """Return counters and sizes."""
        return EngineStatistics(
            n_running=len(self._rows),
            n_waiting=len(self._waiting),
            n_rows=self._options.n_rows,
            n_pages=self._pool.n_pages,
            n_pages_used=self._pool.n_held,
            n_prompt_tokens=self._n_prompt,
            n_reused_tokens=self._n_reused,
            n_new_tokens=self._n_new,
        )

    # --- rows and pages

    def _pages_of(self, request: GenerationRequest) -> int:
        """Return the number of pages for a prompt and its reply, whose last token needs none."""
        return ceil((len(request.prompt) + request.max_new_tokens - 1) / self._pool.page_size)

    def _find(self, request: GenerationRequest) -> list[int]:
        """Return the cached pages that contain the start of a prompt."""
        if self._reads_whole:
            return []
        is_exact = request.seed is not None
        multiple = self._options.chunk // self._pool.page_size if is_exact else 1
        return self._pool.find(request.prompt, request.adapter, is_exact, multiple)

    def _admit(self) -> None:
        """Assign rows and pages to waiting requests, in order."""
        first = self._waiting[0][0] if self._waiting else self._n_requests
        while self._updates and not self._rows and self._updates[0][0] <= first:
            _, self._params = self._updates.popleft()
            self._pool.clear()
        while self._waiting and len(self._rows) < self._options.n_rows:
            number, request = self._waiting[0]
            if self._updates and number >= self._updates[0][0]:
                return
            found = self._find(request)
            self._pool.hold(found)
            n_more = self._pages_of(request) - len(found)
            if n_more > self._pool.n_available:
                self._pool.release(found)
                return
            self._waiting.popleft()
            slot = next(i for i in range(self._options.n_rows) if i not in self._rows)
            row = ServedRow(number, request, [*found, *self._pool.take(n_more)], 0)
            self._rows[slot] = row
            self._n_prompt += len(request.prompt)
            self._start_after(slot, len(found))
            seed = secrets.randbits(32) if request.seed is None else request.seed
            self._table.set(slot, request, seed, self._numbers[request.adapter])

    def _start_after(self, slot: int, n_found: int) -> None:
        """Continue the prefill of a row after pages that are already written."""
        row = self._rows[slot]
        self._n_reused += n_found * self._pool.page_size - row.n_read
        row.n_read = n_found * self._pool.page_size
        row.n_exact = n_found if row.request.seed is not None else 0
        self._tables[slot] = 0
        self._tables[slot, : len(row.pages)] = row.pages

    def _end(self, slot: int) -> None:
        """Free a row; its pages keep their content."""
        row = self._rows.pop(slot)
        written = [*row.request.prompt[: row.n_read], *row.new[:-1]]
        if row.is_prefilled or not row.new:
            self._store(row, written)
        self._pool.release(row.pages)

    def _store(self, row: ServedRow, written: list[int], first: int = 0) -> None:
        if not self._reads_whole and not self._updates:
            self._pool.store(written, row.request.adapter, row.pages, row.n_exact, first)

    # --- dispatch

    def _live(self) -> list[int]:
        """Return the rows that may get more tokens."""
        return [
            slot
            for slot, row in self._rows.items()
            if row.is_prefilled and row.n_dispatched < row.request.max_new_tokens
        ]

    def _needs_masks(self) -> bool:
        return any(row.needs_mask for row in self._rows.values())

    def _read_prompt(self) -> bool:
        """Dispatch a prompt chunk of one row; return whether there was one."""
        slot = next((slot for slot, row in self._rows.items() if not row.is_prefilled), None)
        if slot is None:
            return False
        row, P = self._rows[slot], self._pool.page_size
        prompt = row.request.prompt
        if row.n_read == 0 and (found := self._find(row.request)):
            # Another row has read the same prompt since this one was admitted.
            self._pool.hold(found)
            self._pool.release(row.pages[: len(found)])
            row.pages[: len(found)] = found
            self._start_after(slot, len(found))
        start, rest = row.n_read, len(prompt) - row.n_read
        n = rest if self._reads_whole else min(rest, self._options.chunk)
        tokens_L = np.zeros(padded_chunk(self._options, n), np.int32)
        tokens_L[:n] = prompt[start : start + n]
        is_last = n == rest
        allowed_V = self._all_allowed[0]
        if is_last and row.needs_mask:
            allowed_V = jnp.asarray(row.allowed(self._vocab_size))
        self._state, new = read_chunk(
            self._model,
            self._params,
            self._state,
            self._adapters,
            self._draft,
            self._table.on_device,
            np.int32(slot),
            self._tables[slot].copy(),
            tokens_L,
            np.int32(start),
            np.int32(n),
            np.bool_(is_last),
            allowed_V,
            is_prefix=self._is_prefix,
            sharding=self._sharding,
        )
        is_whole_chunk = n == self._options.chunk and start == row.n_exact * P
        row.n_read += n
        if is_whole_chunk and start % self._options.chunk == 0:
            row.n_exact = row.n_read // P
        self._store(row, list(prompt[: row.n_read]), start // P)
        if is_last:
            row.n_dispatched = 1
            self._in_flight.append(({0: (slot, row.number)}, new))
        return True

    def _dispatch(self, n_steps: int) -> None:
        """Dispatch the next tokens of all prefilled rows.

        Rows that need masks get one token, which the host must read before the next. They are
        dispatched separately from speculative rows, so that no row changes the program of another.
        """
        slots = self._live()
        has_masks = self._needs_masks()
        if not slots or (has_masks and self._in_flight):
            return
        left = max(self._rows[i].request.max_new_tokens - self._rows[i].n_dispatched for i in slots)
        n_steps = 1 if has_masks else min(n_steps, left)
        if not self._options.n_proposed:
            self._dispatch_rows(slots, n_steps, proposes=False)
            return
        for needs_mask in (False, True):
            if some := [slot for slot in slots if self._rows[slot].needs_mask == needs_mask]:
                self._dispatch_rows(some, n_steps, proposes=not needs_mask)

    def _dispatch_rows(self, slots: list[int], n_steps: int, proposes: bool) -> None:
        """Dispatch the next tokens of some rows, with or without speculation."""
        rows = [self._rows[slot] for slot in slots]
        n_rows = self._options.n_rows
        rows_R = np.arange(n_rows, dtype=np.int32)
        if all(row.request.seed is None for row in rows):
            size = next(size for size in batch_sizes(n_rows) if size >= len(slots))
            rows_R = np.full(size, n_rows, np.int32)
            rows_R[: len(slots)] = slots
        allowed_RV = self._all_allowed[: len(rows_R)]
        if any(row.needs_mask for row in rows):
            masks = {slot: self._rows[slot].allowed(self._vocab_size) for slot in slots}
            every = np.ones(self._vocab_size, bool)
            allowed_RV = jnp.asarray(np.stack([masks.get(slot, every) for slot in rows_R.tolist()]))
        run: Any = decode_rows
        before: tuple[Any, ...] = self._model, self._params, self._state, self._adapters
        further: dict[str, Any] = {"sharding": self._sharding}
        if proposes:
            run, before = speculate_rows, (*before, self._draft)
            further["n_proposed"] = self._options.n_proposed
        tables_RM, active_R = self._tables[np.minimum(rows_R, n_rows - 1)], np.isin(rows_R, slots)
        step_rows: Any = rows_R, tables_RM, active_R, np.int32(n_steps), allowed_RV
        n_columns = self._options.steps_per_dispatch
        self._state, new = run(
            *before, self._table.on_device, StepRows(*step_rows), n_columns=n_columns, **further
        )
        at = {int(slot): i for i, slot in enumerate(rows_R)}
        self._in_flight.append(({at[slot]: (slot, self._rows[slot].number) for slot in slots}, new))
        for row in rows:
            row.n_dispatched += n_steps

    def _read(self) -> list[Progress]:
        """Wait for the oldest dispatch, and return the tokens it added."""
        columns, dispatched = self._in_flight.popleft()
        new = jax.device_get(dispatched)
        found = []
        for column, (slot, number) in columns.items():
            row = self._rows.get(slot)
            if row is None or row.number != number:
                continue  # the row has ended meanwhile
            tokens, finish = self._added(row, new, column)
            if tokens or finish:
                found.append(Progress(number, tuple(tokens), finish))
            row.n_dispatched = max(row.n_dispatched, len(row.new))
            if finish:
                self._end(slot)
        return found

    def _added(self, row: ServedRow, new: Any, column: int) -> tuple[list[NewToken], str]:
        """Return the tokens that a dispatch added to a row, and the finish reason."""
        request = row.request
        tokens: list[NewToken] = []
        for j in range(int(new.n)):
            token = int(new.chosen.tokens_B[j, column])
            if token < 0:
                continue  # the row has ended, or a proposal was rejected
            if row.is_stuck:
                return tokens, LENGTH
            if token in request.end_ids:
                return tokens, STOP
            row.new.append(token)
            self._n_new += 1
            tokens.append(new_token(request, new.chosen, (j, column)))
            if len(row.new) == request.max_new_tokens:
                return tokens, LENGTH
        return tokens, ""
