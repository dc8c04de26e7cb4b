"""Engine for models that cannot be paged: LSTMs, encoder–decoders, custom mixers.

Requests run in groups: those without a seed together, each one with a seed alone, so that its reply
depends on nothing else. The next group starts when all rows have ended. Requests with a source that
need only what beam search supports are searched, in groups with equal options.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from lm.data.special_tokens import target_start
from lm.data.tokenizer import Tokenizer
from lm.decoding.batch import search_batches
from lm.decoding.beam import BeamOptions
from lm.decoding.controls import Controls
from lm.decoding.engine.batch_steps import batch_steps
from lm.decoding.engine.option_table import OptionTable
from lm.decoding.engine.requests import (
    LENGTH,
    STOP,
    EngineStatistics,
    GenerationRequest,
    NewToken,
    Progress,
)
from lm.decoding.engine.rows import ServedRow, new_token
from lm.decoding.prompts import check_ids, check_prompts, context_length, is_encoder_decoder
from lm.decoding.weights import prepare
from lm.errors import UserError
from lm.experiment import Experiment
from lm.models.variables import Params


class WholeBatchEngine:
    """Engine that decodes groups of requests; implements `Engine`."""

    def __init__(self, experiment: Experiment, params: Params, n_rows: int):
        """Prepare the parameters.

        Args:
            experiment: experiment on a mesh, with its tokenizer.
            params: parameters.
            n_rows: maximum number of concurrent requests.
        """
        self._unprepared = experiment
        self._experiment, self._params = prepare(experiment, params)
        self._updates: deque[tuple[int, Params]] = (
            deque()
        )  # parameters, by the first request id that uses them
        self._model, self._n_rows = self._experiment.model, n_rows
        self._vocab_size: int = self._model.config.vocab_size  # type: ignore[attr-defined]
        self._table = OptionTable(1, self._vocab_size)
        self._has_source = is_encoder_decoder(self._model)
        prefix = experiment.config.data.target_prefix
        self._start_ids = target_start(experiment.tokenizer, prefix) if self._has_source else ()
        self.context = None if self._has_source else context_length(self._model)
        self._waiting: deque[ServedRow] = deque()
        self._running: dict[int, ServedRow] = {}
        self._steps: Iterator[list[Progress]] = iter(())
        self._n_requests = self._n_prompt = self._n_new = 0

    def add(self, request: GenerationRequest) -> int:
        """Queue a request, and return its id."""
        check_ids([request.prompt], self._model)
        check_prompts([request.prompt], self.context)
        self._table.check(request)
        if request.adapter:
            raise UserError(f"no adapter {request.adapter!r}; this model has no adapters")
        beam_size = self._experiment.config.decode.beam_size
        if self._searches(request) and request.number >= beam_size:
            raise UserError(f"n is above the beam size of the server, {beam_size}")
        # Learned positions limit the target length of an encoder–decoder.
        context = context_length(self._model)
        if context is not None:
            n_before = len(self._start_ids) - 1 if self._has_source else len(request.prompt)
            room = context - n_before
            request = replace(request, max_new_tokens=min(request.max_new_tokens, room))
        self._waiting.append(ServedRow(self._n_requests, request, [], len(request.prompt)))
        self._n_requests += 1
        return self._n_requests - 1

    def cancel(self, number: int) -> None:
        """Cancel a request, if it has not ended."""
        self._waiting = deque(row for row in self._waiting if row.number != number)
        self._running.pop(number, None)

    def step(self) -> list[Progress]:
        """Run until some request makes progress, and return it; [] if no requests are left."""
        while self._running or self._waiting:
            if not self._running:
                self._start_group()
            for progress in self._steps:
                if found := [
                    self._counted(one) for one in progress if one.request in self._running
                ]:
                    return found
                if not self._running:
                    break
            self._running.clear()
        return []

    def update(self, params: Params) -> None:
        """Replace the parameters for later requests, which wait for all earlier ones."""
        if self._updates and self._updates[-1][0] == self._n_requests:
            self._updates.pop()
        self._updates.append((self._n_requests, prepare(self._unprepared, params)[1]))

    def statistics(self) -> EngineStatistics:
        """Return counters and sizes."""
        counters = self._n_prompt, 0, self._n_new
        return EngineStatistics(
            len(self._running), len(self._waiting), self._n_rows, 0, 0, *counters
        )

    def _searches(self, request: GenerationRequest) -> bool:
        """Return whether beam search supports everything that a request asks for."""
        r = request
        further = r.temperature, r.presence_penalty, r.frequency_penalty, r.logit_bias
        return self._has_source and not any(further) and r.top_logprobs is None

    def _start_group(self) -> None:
        first = self._waiting[0]
        while self._updates and self._updates[0][0] <= first.number:
            _, self._params = self._updates.popleft()
        end = self._updates[0][0] if self._updates else self._n_requests
        searches = self._searches(first.request)
        key = self._group_key(first)
        alike = [row for row in self._waiting if row.number < end and self._group_key(row) == key]
        group = alike[: self._n_rows]
        self._running = {row.number: row for row in group}
        self._waiting = deque(row for row in self._waiting if row.number not in self._running)
        self._n_prompt += sum(len(row.request.prompt) for row in group)
        self._steps = self._search(group) if searches else self._sample(group)

    def _group_key(self, row: ServedRow) -> Any:
        """Return the key that requests of a group share."""
        request, is_alone = row.request, row.request.seed is not None
        if self._searches(request):
            return replace(request, prompt=request.prompt if is_alone else (), number=0)
        return row.number if is_alone else None

    def _counted(self, progress: Progress) -> Progress:
        self._n_new += len(progress.tokens)
        if progress.finish:
            del self._running[progress.request]
        return progress

    def _sample(self, group: list[ServedRow]) -> Iterator[list[Progress]]:
        """Yield the progress of samples, token by token."""
        open_rows = dict(enumerate(group))

        def allowed() -> np.ndarray:
            B = 1 << (len(group) - 1).bit_length()
            masks_BV = np.ones((B, self._vocab_size), bool)
            for i, row in open_rows.items():
                masks_BV[i] = row.allowed(self._vocab_size)
            return masks_BV

        steps = batch_steps(
            self._model,
            self._params,
            [row.request for row in group],
            [_seed(row.request) for row in group],
            allowed if any(row.needs_mask for row in group) else None,
            self._start_ids,
            self._experiment.objective.has_prefix,
        )
        for chosen in steps:
            found = []
            for i, row in list(open_rows.items()):
                request, token = row.request, int(chosen.tokens_B[i])
                finish = LENGTH if row.is_stuck else STOP if token in request.end_ids else ""
                new = () if finish else (new_token(request, chosen, i),)
                row.new += [one.id for one in new]
                if len(row.new) == request.max_new_tokens:
                    finish = LENGTH
                found.append(Progress(row.number, new, finish))
                if finish or row.number not in self._running:
                    del open_rows[i]
            yield found

    def _search(self, group: list[ServedRow]) -> Iterator[list[Progress]]:
        """Yield complete hypotheses of beam search; `number` is the rank."""
        config, first = self._experiment.config, group[0].request
        options = BeamOptions(
            config.decode.beam_size,
            first.max_new_tokens,
            config.decode.length_penalty,
            self._controls(first),
        )
        sources = list(dict.fromkeys(row.request.prompt for row in group))
        assert self._experiment.tokenizer is not None
        tokenizer: Tokenizer = self._experiment.tokenizer
        hypotheses = search_batches(self._experiment, self._params, tokenizer, sources, options)
        found = dict(zip(sources, hypotheses, strict=True))
        progress = []
        for row in group:
            best = found[row.request.prompt]
            tokens = best[row.request.number].tokens if row.request.number < len(best) else []
            row.new = tokens
            is_whole = len(tokens) < first.max_new_tokens and self._may_end(row)
            finish = STOP if is_whole else LENGTH
            progress.append(Progress(row.number, tuple(map(NewToken, tokens)), finish))
        yield progress

    def _may_end(self, row: ServedRow) -> bool:
        """Return whether the limits of a reply allow it to end here."""
        ends = list(row.request.end_ids)
        return not ends or bool(row.allowed(self._vocab_size)[ends].any() and not row.is_stuck)

    def _controls(self, request: GenerationRequest) -> Controls:
        return Controls(
            request.end_ids,
            request.repetition_penalty,
            request.banned,
            request.min_new_tokens,
            request.limits,
        )


def _seed(request: GenerationRequest) -> int:
    return secrets.randbits(32) if request.seed is None else request.seed
