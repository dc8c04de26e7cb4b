"""Engine of models that cannot be paged: LSTMs, encoder–decoders with beam search, other mixers.

Requests run in groups: those with equal options and no seed of their own together, one with a seed
alone, so that nothing else changes its reply. The next group starts when all rows have ended.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from lm.data.tokenizer import Tokenizer
from lm.decoding.batch import search_batches
from lm.decoding.beam import BeamOptions
from lm.decoding.controls import UNSET, Controls
from lm.decoding.engine.requests import (
    LENGTH,
    STOP,
    EngineStatistics,
    GenerationRequest,
    NewToken,
    Progress,
)
from lm.decoding.prompts import (
    check_ids,
    check_prompts,
    context_length,
    is_encoder_decoder,
    padded_length,
)
from lm.decoding.sampling import Sampling, sample_steps
from lm.decoding.weights import prepare
from lm.errors import UserError
from lm.experiment import Experiment
from lm.models.variables import Params

_STEPS = 4  # of a dispatch


@dataclass
class _Row:
    number: int
    request: GenerationRequest
    n_new: int = 0


class WholeBatchEngine:
    """Engine that decodes groups of requests; implements `Engine`."""

    def __init__(self, experiment: Experiment, params: Params, n_rows: int):
        """Prepare the parameters.

        Args:
            experiment: experiment on a mesh, with its tokenizer.
            params: its parameters.
            n_rows: most requests that run at once.
        """
        self._unprepared = experiment
        self._experiment, self._params = prepare(experiment, params)
        self._next_params: Params | None = None
        self._model, self._n_rows = self._experiment.model, n_rows
        self._searches = is_encoder_decoder(self._model)
        self.context = context_length(self._model)
        if self._searches:
            self.context = None
        self._waiting: list[_Row] = []
        self._running: dict[int, _Row] = {}
        self._steps: Iterator[list[Progress]] = iter(())
        self._n_requests = self._n_prompt = self._n_new = 0

    def add(self, request: GenerationRequest) -> int:
        """Queue a request, and return its number."""
        check_ids([request.prompt], self._model)
        self._check(request)
        if not self._searches:
            check_prompts([request.prompt], self.context)
        self._waiting.append(_Row(self._n_requests, request))
        self._n_requests += 1
        return self._n_requests - 1

    def cancel(self, number: int) -> None:
        """End a request; one that has ended is ignored."""
        self._waiting = [row for row in self._waiting if row.number != number]
        self._running.pop(number, None)

    def step(self) -> list[Progress]:
        """Run until some request has progress, and return it; [] if there is none to run."""
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
        """Replace the parameters, once all running requests have ended; others wait for that."""
        _, self._next_params = prepare(self._unprepared, params)

    def statistics(self) -> EngineStatistics:
        """Return counters and sizes."""
        counters = self._n_prompt, 0, self._n_new
        return EngineStatistics(
            len(self._running), len(self._waiting), self._n_rows, 0, 0, *counters
        )

    def _check(self, request: GenerationRequest) -> None:
        """Raise UserError for an option that this engine does not have."""
        names = ("min_p", "presence_penalty", "frequency_penalty", "logit_bias", "adapter")
        wrong = [name for name in names if getattr(request, name)]
        wrong += ["logprobs"] if request.top_logprobs is not None else []
        if self._searches:
            beam_size = self._experiment.config.decode.beam_size
            sampled = request.temperature or request.top_k or request.top_p < 1
            wrong += ["temperature, top_k or top_p"] if sampled else []
            if request.number >= beam_size:
                raise UserError(f"n is above the beam size of the server, {beam_size}")
        if wrong:
            family = self._experiment.config.model.family
            raise UserError(f"a model of the family {family} is served without {wrong[0]}")
        if request.max_new_tokens < 1:
            raise UserError(f"{request.max_new_tokens} new tokens are less than one")

    def _start_group(self) -> None:
        if self._next_params is not None:
            self._params, self._next_params = self._next_params, None
        first = self._waiting[0].request
        alike = [
            row
            for row in self._waiting
            if row is self._waiting[0]
            or (first.seed is None and _options(row.request) == _options(first))
        ]
        group = alike[: self._n_rows]
        self._waiting = [row for row in self._waiting if row not in group]
        self._running = {row.number: row for row in group}
        self._n_prompt += sum(len(row.request.prompt) for row in group)
        self._steps = self._search(group) if self._searches else self._sample(group)

    def _counted(self, progress: Progress) -> Progress:
        self._n_new += len(progress.tokens)
        if progress.finish:
            del self._running[progress.request]
        return progress

    def _sample(self, group: list[_Row]) -> Iterator[list[Progress]]:
        """Yield the progress of samples, token by token."""
        first, n = group[0].request, 1 << (len(group) - 1).bit_length()
        most = max(row.request.max_new_tokens for row in group)
        prompts = [row.request.prompt for row in group]
        is_alone = first.seed is not None
        steps = sample_steps(
            self._model,
            self._params,
            [*prompts, *[prompts[0]] * (n - len(group))],
            padded_length(most + 1),
            Sampling(first.temperature, first.top_k, first.top_p),
            first.seed if first.seed is not None else secrets.randbits(32),
            self._controls(first),
            has_prefix=self._experiment.objective.has_prefix,
            numbers=[first.number] if is_alone else range(n),
            per_dispatch=_STEPS,
        )
        open_rows = dict(enumerate(group))
        for ids_B in steps:
            found = []
            for i, row in list(open_rows.items()):
                if ids_B[i] == UNSET:
                    context = self.context or len(row.request.prompt) + row.n_new + 1
                    is_full = len(row.request.prompt) + row.n_new >= context
                    found.append(Progress(row.number, finish=LENGTH if is_full else STOP))
                else:
                    row.n_new += 1
                    is_last = row.n_new == row.request.max_new_tokens
                    finish = LENGTH if is_last else ""
                    found.append(Progress(row.number, (NewToken(int(ids_B[i])),), finish))
                if found[-1].finish:
                    del open_rows[i]
            yield found
            if not open_rows:
                return
        yield [Progress(row.number, finish=STOP) for row in open_rows.values()]

    def _search(self, group: list[_Row]) -> Iterator[list[Progress]]:
        """Yield the hypotheses of beam search, whole; `number` is the place among the best."""
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
            finish = LENGTH if len(tokens) >= first.max_new_tokens else STOP
            progress.append(Progress(row.number, tuple(map(NewToken, tokens)), finish))
        yield progress

    def _controls(self, request: GenerationRequest) -> Controls:
        return Controls(
            request.end_ids,
            request.repetition_penalty,
            request.banned,
            request.min_new_tokens,
            request.limits,
        )


def _options(request: GenerationRequest) -> Any:
    """Return what the requests of a group have in common."""
    same = replace(request, prompt=(), number=0)
    return same if request.temperature == 0 else replace(same, max_new_tokens=0)
