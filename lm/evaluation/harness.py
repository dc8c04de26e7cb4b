"""EleutherAI's lm-eval on a run: its tasks, metrics and result files, with our model.

`HarnessModel` answers lm-eval's requests by token log-likelihoods and by decoding, on any mesh.
Answers are stored in a JSON-lines file next to the results, so that a restart continues.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jax.experimental import multihost_utils

from lm.data.chat.chat_encoder import ChatEncoder, role_names
from lm.data.chat.chat_template import ChatTemplate
from lm.data.chat.extended_tokenizer import ExtendedTokenizer
from lm.data.special_tokens import special_tokens
from lm.data.tokenizer import Tokenizer
from lm.decoding.batch import decode_best, sample_batches
from lm.decoding.beam import BeamOptions
from lm.decoding.controls import Controls
from lm.decoding.prompts import (
    generates_text,
    is_encoder_decoder,
    prompt_ids,
    require_text_input,
)
from lm.decoding.sampling import Sampling
from lm.decoding.text_stream import text_after, text_before
from lm.errors import UserError, missing_package
from lm.evaluation.likelihood import Request, first_ids, score, split_request
from lm.experiment import Experiment
from lm.models.variables import Params
from lm.parallel.mesh import is_primary_host
from lm.progress import progress_bar
from lm.storage import parse_json

try:
    from lm_eval.api.model import LM
except ImportError as error:
    raise missing_package("lm eval --harness", "lm-eval", "harness") from error

_WINDOW = 1024  # requests sorted by length together; a crash loses up to this many
_TASK_FILES = (".yaml", ".yml")
_NEW_TOKENS = 256  # default for tasks without a limit, as in lm-eval's own models


@dataclass
class Answers:
    """Cached answers by request digest, stored in a file.

    The first line of the file identifies the parameters; for other parameters it is restarted. Only
    the primary host reads and writes it; all processes compute the same requests.
    """

    file: Path
    weights: Mapping[str, Any]
    _known: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not is_primary_host():
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        whole = self.file.read_bytes() if self.file.exists() else b""
        whole = whole[: whole.rfind(b"\n") + 1]
        try:
            first, *lines = (parse_json(line, self.file) for line in whole.splitlines())
            if first != {"weights": dict(self.weights)}:
                raise UserError("other parameters")
            self._known = {line["request"]: line["answer"] for line in lines}
        except (UserError, ValueError, KeyError):
            whole = json.dumps({"weights": dict(self.weights)}).encode() + b"\n"
        self.file.write_bytes(whole)

    def answer(
        self,
        requests: Sequence[tuple[Any, ...]],
        compute: Callable[[Sequence[int]], list[Any]],
    ) -> list[Any]:
        """Return the answer to each request.

        Args:
            requests: JSON values that the answers depend on.
            compute: returns JSON answers to the requests at some indices.
        """
        keys = [hashlib.sha256(json.dumps(r).encode()).hexdigest() for r in requests]
        is_known = np.array([key in self._known for key in keys], bool)
        is_known = multihost_utils.broadcast_one_to_all(is_known)
        missing = [i for i, known in enumerate(is_known) if not known]
        shown = is_primary_host()
        with progress_bar(
            "scoring", len(keys), initial=len(keys) - len(missing), shown=shown
        ) as bar:
            for start in range(0, len(missing), _WINDOW):
                window = missing[start : start + _WINDOW]
                found = dict(zip((keys[i] for i in window), compute(window), strict=True))
                self._known |= found
                if shown:
                    lines = ({"request": key, "answer": value} for key, value in found.items())
                    with self.file.open("a") as stream:
                        stream.writelines(json.dumps(line) + "\n" for line in lines)
                bar.update(len(window))
        return [self._known.get(key) for key in keys]


class ChatTokenizer(ExtendedTokenizer):
    """Tokenizer for rendered chat prompts, in which special tokens are parsed."""

    def encode(self, text: str) -> np.ndarray:
        return self._encoder.encode(text, None, {}).ids

    def encode_batch(self, texts: Any) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    @cached_property
    def _encoder(self) -> ChatEncoder:
        return ChatEncoder(ExtendedTokenizer(self.base, self.names, self.jinja))


def chat_tokenizer(tokenizer: Tokenizer) -> ChatTokenizer:
    """Return a tokenizer for chat prompts; UserError without a chat template."""
    plain = tokenizer if isinstance(tokenizer, ExtendedTokenizer) else ExtendedTokenizer(tokenizer)
    if not plain.chat_templates:
        raise UserError("--apply_chat_template: the tokenizer of the run has no chat template")
    return ChatTokenizer(plain.base, plain.names, plain.jinja, plain.reads_markers)


class HarnessModel(LM):
    """lm-eval model backed by one of our runs.

    Args:
        experiment: experiment on a mesh.
        params: parameters.
        tokenizer: its tokenizer.
        answers: answers of earlier starts.
        progress: called with the number of rows in each finished batch; may raise.
    """

    def __init__(
        self,
        experiment: Experiment,
        params: Params,
        tokenizer: Tokenizer,
        answers: Answers,
        progress: Callable[[int], Any] = lambda n: None,
    ):
        super().__init__()
        self._experiment, self._params, self._tokenizer = experiment, params, tokenizer
        self._answers, self._progress = answers, progress

    @property
    def max_length(self) -> int:
        """Context length in tokens."""
        return self._experiment.config.model.max_length

    @property
    def tokenizer_name(self) -> str:
        """Identity of the tokenizer."""
        return self._tokenizer.digest

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the Jinja source of the chat template."""
        return self._chat.source

    @cached_property
    def _chat(self) -> ChatTemplate:
        return ChatTemplate.of(self._tokenizer)

    @cache  # noqa: B019  once per model
    def _drops_system(self) -> None:
        logging.warning(
            "the chat template does not support system messages: prompts are built without them"
        )

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render messages as a prompt, without the bos that every prompt starts with anyway."""
        ends: dict[str, Any] = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            text = self._chat.render(chat_history, **ends)
        except UserError:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) in (0, len(chat_history)):
                raise
            text = self._chat.render(others, **ends)
            self._drops_system()
        bos = role_names(self._tokenizer).get("bos")
        return text.removeprefix(bos) if bos and prompt_ids(self._tokenizer, "") else text

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Return log-likelihood and greediness of each continuation."""
        pairs = [request.args for request in requests]
        experiment, tokenizer = self._experiment, self._tokenizer

        def compute(numbers: Sequence[int]) -> list[Any]:
            split = [split_request(experiment, tokenizer, *pairs[i]) for i in numbers]
            scores = score(experiment, self._params, tokenizer, split, self._progress)
            return [
                [float(s.log_likelihoods.sum(dtype=np.float64)), bool(s.greedy.all())]
                for s in scores
            ]

        found = self._answers.answer([("loglikelihood", *pair) for pair in pairs], compute)
        return [tuple(answer) if answer else (0.0, False) for answer in found]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Return the log-likelihood of each text, in windows if longer than the context."""
        texts = [request.args[0] for request in requests]

        def compute(numbers: Sequence[int]) -> list[Any]:
            windows = [self._windows(texts[i]) for i in numbers]
            flat = [window for of_text in windows for window in of_text]
            parts = self._experiment, self._params, self._tokenizer
            scores = iter(score(*parts, flat, self._progress))
            return [
                sum(float(next(scores).log_likelihoods.sum(dtype=np.float64)) for _ in of_text)
                for of_text in windows
            ]

        return self._answers.answer([("rolling", text) for text in texts], compute)

    def _windows(self, text: str) -> list[Request]:
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        if self._experiment.config.model.family == "encoder":
            return [Request([], self._tokenizer.encode(text))]
        special = special_tokens(self._tokenizer)
        if is_encoder_decoder(self._experiment.model):
            ids, start = [*self._tokenizer.encode(text), special.eos], [special.eos]
        else:
            ids, start = prompt_ids(self._tokenizer, text), first_ids(self._tokenizer)
        if not start:
            raise UserError("the tokenizer has no token to start a text with")
        windows = get_rolling_token_windows(list(map(int, ids)), start[-1], self.max_length, 1)
        return [Request(*make_disjoint_window(window)) for window in windows]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Return a continuation of each prompt, up to the first stop text of the task."""
        arguments = [request.args for request in requests]

        def compute(numbers: Sequence[int]) -> list[Any]:
            found: dict[int, str] = {}
            kinds = {json.dumps(arguments[i][1], sort_keys=True) for i in numbers}
            for kind in sorted(kinds):
                same = [i for i in numbers if json.dumps(arguments[i][1], sort_keys=True) == kind]
                texts = self._generate([arguments[i][0] for i in same], arguments[same[0]][1])
                found |= zip(same, texts, strict=True)
            return [found[i] for i in numbers]

        found = self._answers.answer([("generate", *pair) for pair in arguments], compute)
        return [text or "" for text in found]

    def _generate(self, prompts: list[str], options: Mapping[str, Any]) -> list[str]:
        """Return continuations with the options of a task, lm-eval's `generation_kwargs`."""
        from lm_eval.models.utils import normalize_gen_kwargs

        require_text_input(self._experiment.model, "lm eval --harness")
        chosen = normalize_gen_kwargs(dict(options), _NEW_TOKENS)
        n_new, tokenizer = chosen["max_gen_toks"], self._tokenizer
        config = self._experiment.config.copy_and_resolve_references()
        config.decode.max_length, config.decode.beam_size = n_new, 1
        experiment = replace(self._experiment, config=config)
        ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
        if is_encoder_decoder(experiment.model):
            special = special_tokens(tokenizer)
            ids = [special.source(tokenizer.encode(p), self.max_length).tolist() for p in prompts]
            beam = BeamOptions.from_config(config, tokenizer)
            outputs = decode_best(experiment, self._params, tokenizer, ids, beam, self._progress)
            written = [text_after(tokenizer, [], new) for new in outputs]
        else:
            room = self.max_length - n_new
            if room <= 0:
                raise UserError(
                    f"the task generates {n_new} tokens, but the context holds {self.max_length}"
                )
            ids = [prompt[-room:] for prompt in ids]
            temperature = float(chosen.get("temperature", 0.0))
            sampling = Sampling(
                temperature, int(chosen.get("top_k", 0)), float(chosen.get("top_p", 1.0))
            )
            controls = Controls.from_config(config, tokenizer)
            sampled = sample_batches(
                experiment, self._params, ids, sampling, 0, controls, progress=self._progress
            )
            written = [
                text_after(tokenizer, prompt, hypotheses[0].tokens)
                for prompt, hypotheses in zip(ids, sampled, strict=True)
            ]
        stop = [text for text in chosen["until"] if text]
        return [text_before(stop, text) for text in written]


def load_tasks(
    experiment: Experiment,
    tasks: Sequence[str],
    include_path: str | None = None,
    option: str = "--harness ",
) -> Any:
    """Load lm-eval tasks and their data.

    Args:
        experiment: experiment on a mesh, which must fit the tasks.
        tasks: names of tasks or groups, or paths of YAML task files.
        include_path: folder with additional task files, which may contain code to execute.
        option: option that named the tasks, for messages.

    Returns:
        lm-eval's task manager.

    Raises:
        UserError: a task does not exist, its data cannot be read, or it does not fit the model.
    """
    if include_path is not None and not os.path.isdir(include_path):
        raise UserError(f"--include_path {include_path}: no such folder")
    from lm_eval.tasks import TaskManager

    for package in ("lm_eval", "huggingface_hub"):
        logging.getLogger(package).setLevel(logging.ERROR)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # forking next to JAX's threads may hang
    with _errors_of_tasks(option, tasks):
        manager = TaskManager(include_path=include_path, include_defaults=False)
        names = {task for task in tasks if Path(task).suffix not in _TASK_FILES}
        if not names <= set(manager.all_tasks):  # indexing its thousands of tasks takes seconds
            manager = TaskManager(include_path=include_path)
        _require_known(tasks, manager.all_tasks)
        _require_fitting(experiment, manager.load(list(tasks))["tasks"])
    return manager


@contextmanager
def _errors_of_tasks(option: str, tasks: Sequence[str]) -> Iterator[None]:
    """Convert exceptions of tasks (which are code) and data libraries to UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise UserError(
            f"{option}{','.join(tasks)}: {type(error).__name__}: {' '.join(lines[:1])}"
        ) from error


def evaluate_tasks(
    experiment: Experiment,
    params: Params,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    folder: Path,
    weights: Mapping[str, Any],
    *,
    shots: int | None = None,
    limit: int | None = None,
    include_path: str | None = None,
    resamples: int = 100_000,
    chat: bool = False,
    progress: Callable[[int], Any] = lambda n: None,
    option: str = "--harness ",
) -> dict[str, Any]:
    """Evaluate a run on lm-eval tasks, and write lm-eval's result files.

    Args:
        experiment: experiment on a mesh.
        params: parameters.
        tokenizer: its tokenizer.
        tasks: names of tasks or groups, or paths of YAML task files.
        folder: output folder of results.json, samples_TASK.jsonl and answers.jsonl.
        weights: identity of the parameters; cached answers are used only if it matches.
        shots: few-shot examples per prompt; None: the task's own number.
        limit: number of documents per task; None: all.
        include_path: folder with additional task files, which may contain code to execute.
        resamples: bootstrap samples for standard errors; 0: none.
        chat: build prompts with the tokenizer's chat template.
        progress: called with the number of rows in each finished batch; may raise.
        option: option that named the tasks, for messages.

    Returns:
        lm-eval's results.

    Raises:
        UserError: a task does not exist, its data cannot be read, or it does not fit the model.
    """
    from lm_eval import simple_evaluate

    if chat:
        tokenizer = chat_tokenizer(tokenizer)
    manager = load_tasks(experiment, tasks, include_path, option)
    answers = Answers(folder / "answers.jsonl", weights)
    model = HarnessModel(experiment, params, tokenizer, answers, progress)
    with _errors_of_tasks(option, tasks), redirect_stdout(sys.stderr):
        results: Any = simple_evaluate(
            model,
            tasks=list(tasks),
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=resamples,
            apply_chat_template=chat,
        )
    if is_primary_host():
        _write_results(folder, results)
    return results


def _require_known(tasks: Sequence[str], known: Sequence[str]) -> None:
    for task in tasks:
        if task in known or Path(task).is_file():
            continue
        near = difflib.get_close_matches(task, known, 3)
        hint = f"; similar names: {', '.join(near)}" if near else ""
        raise UserError(f"lm-eval has no task {task!r}{hint}; --include_path adds a folder")


def _require_fitting(experiment: Experiment, tasks: Mapping[str, Any]) -> None:
    """Raise UserError for tasks that a model cannot answer."""
    family = experiment.config.model.family
    for name, task in tasks.items():
        kind = task.get_config("output_type")
        if kind == "generate_until" and not generates_text(experiment):
            raise UserError(f"{name}: a model of family {family} does not generate text")
        scoring = (task.get_config("metadata") or {}).get("scoring")
        if family == "encoder" and scoring != "pll":
            raise UserError(
                f"{name}: an encoder only has pseudo-log-likelihoods, for tasks with "
                "`scoring: pll` in their metadata"
            )


def _write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write the files that lm-eval's own command line writes."""
    from lm_eval.utils import handle_non_serializable

    def text(value: Any, indent: int | None = None) -> str:
        options = {"default": handle_non_serializable, "ensure_ascii": False, "indent": indent}
        return json.dumps(value, **options) + "\n"

    samples = results.pop("samples", {})
    for task, of_task in samples.items():
        lines = "".join(map(text, of_task))
        (folder / f"samples_{Path(task).stem}.jsonl").write_text(lines, encoding="utf-8")
    (folder / "results.json").write_text(text(results, 2), encoding="utf-8")


def task_figures(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of all tasks as TASK/METRIC, with standard errors as METRIC_stderr."""
    found = {}
    for task, metrics in results["results"].items():
        for name, value in metrics.items():
            metric, _, filtered = name.partition(",")
            if isinstance(value, int | float) and metric != "sample_len":
                suffix = "" if filtered in ("", "none") else f",{filtered}"
                found[f"{task}/{metric}{suffix}"] = float(value)
    return found
