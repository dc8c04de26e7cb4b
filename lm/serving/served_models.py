"""Runs loaded by a server: their capabilities, and reload of newer checkpoints."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lm.data.chat.chat_template import ChatTemplate
from lm.data.tokenizer import Tokenizer
from lm.decoding.chats import Chat, chat_ids, chat_template, stop_texts
from lm.decoding.controls import Controls
from lm.decoding.engine.adapters import Adapters, load_adapters
from lm.decoding.engine.choice import open_engine
from lm.decoding.engine.requests import GenerationRequest
from lm.decoding.engine.sizes import (
    EngineOptions,
    engine_kernel_problems,
    is_pageable,
    warm_up_requests,
)
from lm.decoding.guard import Guard, open_guard
from lm.decoding.prompts import (
    generates_text,
    is_encoder_decoder,
    prompt_ids,
    require_text_input,
    source_ids,
)
from lm.decoding.text_limits import spelling
from lm.decoding.weights import prepare
from lm.errors import UserError
from lm.experiment import Experiment
from lm.models.variables import Params
from lm.runs.checkpoints import BEST_FOLDER
from lm.runs.saved_params import load_tokenizer, restore_params, restore_run
from lm.runs.workdir import checkpoint_steps
from lm.serving.engine_thread import EngineThread
from lm.storage import open_run_folder

Log = Callable[[str], Any]


@dataclass(frozen=True)
class WeightsChoice:
    """Choice of a run's weights.

    Attributes:
        average: number of newest checkpoints to average.
        best: use the checkpoint kept by `--config.eval.best`.
    """

    average: int = 1
    best: bool = False


@dataclass(eq=False)
class ServedModel:
    """Served run.

    Attributes:
        name: model name in requests.
        folder: folder of the run.
        weights: choice of weights.
        experiment: experiment on a mesh, as restored.
        prepared: experiment converted for decoding (`lm/decoding/weights.py`).
        params: parameters.
        step: training step of the weights.
        tokenizer: tokenizer of the run.
        engine: engine thread; None for a model that generates no text.
        template: chat template, or None.
        guard: guard of `--config.decode.guard`.
        adapter_names: names of its low-rank adapters, which requests use as model names.
        adapters: the adapters.
        sizes: sizes of the engine.
        created: load time.
        worker: single thread for tokenization and guard.
        grammar_worker: threads that compile grammars, which may take seconds.
    """

    name: str
    folder: Path
    weights: WeightsChoice
    experiment: Experiment
    prepared: Experiment
    params: Params
    step: int
    tokenizer: Tokenizer
    engine: EngineThread | None = None
    template: ChatTemplate | None = None
    guard: Guard | None = None
    adapter_names: tuple[str, ...] = ()
    adapters: Adapters | None = None
    sizes: EngineOptions = field(default_factory=EngineOptions)
    created: int = field(default_factory=lambda: int(time.time()))
    worker: ThreadPoolExecutor = field(default_factory=partial(ThreadPoolExecutor, 1))
    grammar_worker: ThreadPoolExecutor = field(default_factory=partial(ThreadPoolExecutor, 2))

    @property
    def has_source(self) -> bool:
        """True for an encoder–decoder, which generates targets from sources."""
        return is_encoder_decoder(self.experiment.model)

    @property
    def kind(self) -> str:
        """Task of the model: "generate", "classify" or "embed"."""
        if self.engine is not None:
            return "generate"
        name = self.experiment.config.objective.name
        return "classify" if name == "classification" else "embed"

    @property
    def n_rows(self) -> int:
        """Maximum concurrent replies, or groups of texts."""
        return self.engine.statistics.n_rows if self.engine else 1

    @cached_property
    def spelling(self) -> Callable[[int], bytes | None]:
        """Function from a token id to the bytes it adds to a text."""
        return spelling(self.tokenizer)

    @cached_property
    def pieces(self) -> list[str]:
        """Vocabulary entries by id."""
        return self.tokenizer.pieces()

    def token_text(self, token: int) -> str:
        """Return the text of a token; for a special token, its name."""
        known = token < self.tokenizer.vocab_size
        found = self.spelling(token) if known else b""
        return self.pieces[token] if found is None else found.decode(errors="replace")

    @cached_property
    def controls(self) -> Controls:
        """Constraints of `--config.decode` on completions."""
        return Controls.from_config(self.experiment.config, self.tokenizer)

    @cached_property
    def chat_controls(self) -> Controls:
        """Constraints of `--config.decode` on chat answers."""
        ends = self.template.stop_ids if self.template else ()
        return Controls.from_config(self.experiment.config, self.tokenizer, ends)

    @cached_property
    def chat_stops(self) -> tuple[str, ...]:
        """Texts that end a chat answer."""
        return stop_texts(self.template) if self.template else ()

    def prompt_ids(self, text: str) -> list[int]:
        """Tokenize a prompt or a source."""
        if self.has_source:
            length = self.experiment.config.data.sequence_length
            return source_ids(self.tokenizer, text, len(text.encode()) + length)
        return prompt_ids(self.tokenizer, text)

    def check_sources(self, inputs: Sequence[Sequence[int]]) -> None:
        """Raise UserError for a source longer than the model's sequence length."""
        length = self.experiment.config.data.sequence_length
        longest = max(map(len, inputs))
        if self.has_source and longest > length:
            raise UserError(f"the source has {longest} tokens; the model reads {length}")

    def adapter_number(self, name: str) -> int:
        """Return the adapter index for a model name; 0: base model."""
        return ("", *self.adapter_names).index(name if name in self.adapter_names else "")

    def chat_ids(self, chat: Chat) -> list[int]:
        """Tokenize a conversation."""
        assert self.template is not None
        return chat_ids(self.template, chat)

    async def in_worker(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function in the model's worker thread, and return its result."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.worker, partial(function, *arguments))

    async def warm_up(self, log: Log) -> None:
        """Compile the programs of the engine, so that no client has to wait for them."""
        if self.engine is None:
            return
        requests = warm_up_requests(self.sizes, self.engine.context or 0)
        if not is_pageable(self.prepared):
            length = self.experiment.config.decode.max_length if self.has_source else 2
            prompt, temperature = tuple(self.prompt_ids("a")), 0.0 if self.has_source else 1.0
            ends = self.controls.end_ids
            requests = [GenerationRequest(prompt, length, temperature, end_ids=ends)]
        try:
            async for _ in self.engine.submit(requests):
                pass
        except (UserError, RuntimeError) as error:  # errors that a client would get
            log(f"{self.name}: {error}")

    def close(self) -> None:
        """Stop its threads."""
        if self.engine is not None:
            self.engine.stop()
        for worker in (self.worker, self.grammar_worker):
            worker.shutdown(wait=False, cancel_futures=True)

    def _prepared(self, params: Params) -> Params:
        return params if self.kind == "classify" else prepare(self.experiment, params)[1]

    async def reload(self, log: Log) -> None:
        """Switch to the newest checkpoint if there is one; on errors, log and keep the old one."""
        if self.adapters is not None:
            log(f"{self.name}: not reloaded, because its adapters belong to step {self.step}")
            return
        try:
            folder = self.folder / BEST_FOLDER if self.weights.best else self.folder
            newest = max(checkpoint_steps(folder), default=-1)
            if newest <= self.step:
                return
            loaded = asyncio.to_thread(
                restore_params,
                self.experiment,
                self.folder,
                log,
                self.weights.average,
                self.weights.best,
            )
            params, step = await loaded
            if step <= self.step:
                log(f"{self.name}: step {newest} cannot be read; still serving step {self.step}")
                return
            params = await asyncio.to_thread(self._prepared, params)
            # Atomic: requests submitted before get the old weights, later ones the new.
            if self.engine is not None:
                self.engine.update(params)
            self.params, self.step = params, step
            log(f"{self.name}: serving step {step}")
        except Exception as error:  # a damaged checkpoint or a full disk can raise anything
            log(f"{self.name}: reload failed, still serving step {self.step}: {error}")


def open_models(
    places: Mapping[str, str],
    weights: WeightsChoice,
    overrides: Mapping[str, str],
    sizes: EngineOptions,
    log: Log,
    adapters: Mapping[str, str],
    draft: str = "",
) -> list[ServedModel]:
    """Load runs, and start their engines.

    Args:
        places: workdir by model name.
        weights: choice of weights for each run.
        overrides: configuration keys from the command line.
        sizes: sizes of each engine.
        log: called with lines for the operator.
        adapters: workdir by adapter name, of LoRA runs whose base is the first run.
        draft: workdir of a draft model for the first run; "": none.

    Raises:
        UserError: a run cannot be loaded or served.
    """
    return [
        _open_model(*place, weights, overrides, sizes, log, *(({}, "") if i else (adapters, draft)))
        for i, place in enumerate(places.items())
    ]


def _open_model(
    name: str,
    workdir: str,
    weights: WeightsChoice,
    overrides: Mapping[str, str],
    sizes: EngineOptions,
    log: Log,
    adapters: Mapping[str, str],
    draft: str,
) -> ServedModel:
    folder = open_run_folder(workdir)
    options: Any = {"average": weights.average, "best": weights.best, "any_batch": True}
    options |= {"heads_optional": True}
    experiment, params, step = restore_run(folder, overrides, log, **options)
    require_text_input(experiment.model, "lm serve")
    tokenizer = experiment.tokenizer or load_tokenizer(folder)
    is_classifier = experiment.config.objective.name == "classification"
    prepared = (experiment, params) if is_classifier else prepare(experiment, params)
    model = ServedModel(name, folder, weights, experiment, *prepared, step, tokenizer)
    if not generates_text(experiment):
        return model
    model.guard = open_guard(experiment.config.decode)
    _ = model.controls  # raises UserError for an invalid grammar
    try:
        model.template = chat_template(experiment)
    except UserError as error:
        if not model.has_source:
            log(f"{name}: chat is disabled: {error}")
    _ = model.chat_controls  # now, because compiling them may take long
    if not is_pageable(prepared[0]):
        log(f"{name}: served in whole batches: not all layers are attention on a single stage")
    elif problem := next(engine_kernel_problems(prepared[0]), ""):
        log(f"{name}: reading pages without the TPU kernel, which cannot be used with {problem}")
    if adapters:
        folders = {name: open_run_folder(place) for name, place in adapters.items()}
        model.adapter_names = tuple(folders)
        model.adapters = load_adapters(folder, folders, experiment.param_infos)
    model.sizes = sizes
    own: Any = {"names": model.adapter_names, "adapters": model.adapters}
    if draft:
        proposer = restore_run(open_run_folder(draft), {}, log, any_batch=True)[:2]
        if proposer[0].tokenizer is None or proposer[0].tokenizer.digest != tokenizer.digest:
            raise UserError(f"--draft {draft}: its tokenizer differs from that of {workdir}")
        own["draft"] = proposer
    make = partial(open_engine, options=sizes, **own)
    model.engine = EngineThread(make, *prepared, name, log)
    return model
