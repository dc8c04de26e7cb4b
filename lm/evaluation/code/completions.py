"""Generation of completions for programming problems."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lm.data.tokenizer import Tokenizer
from lm.decoding.batch import sample_batches
from lm.decoding.chats import Chat, chat_controls, chat_ids
from lm.decoding.controls import Controls
from lm.decoding.prompts import context_length, prompt_ids
from lm.decoding.sampling import Sampling
from lm.decoding.text_stream import text_after, text_before
from lm.evaluation.code.problems import Completion, Problem
from lm.experiment import Experiment
from lm.models.variables import Params

if TYPE_CHECKING:
    from lm.data.chat.chat_template import ChatTemplate

_BLOCK = re.compile(r"^[ \t]*```[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)


def write_completions(
    experiment: Experiment,
    params: Params,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    n_samples: int,
    sampling: Sampling,
    seed: int,
    template: ChatTemplate | None = None,
    progress: Callable[[int], Any] = lambda n: None,
) -> list[Completion]:
    """Sample completions: continuations of the prompts, or code blocks of chat replies.

    Args:
        experiment: experiment on a mesh.
        params: parameters.
        tokenizer: tokenizer of the data.
        problems: the problems.
        n_samples: completions per problem.
        sampling: sampling options.
        seed: seed of all samples.
        template: chat template of a chat model; None: the model continues prompts.
        progress: called with the number of samples in each finished batch.
    """
    if template is None:
        ids = [prompt_ids(tokenizer, problem.prompt) for problem in problems]
        controls = Controls.from_config(experiment.config, tokenizer)
    else:
        requests = [{"role": "user", "content": problem.request} for problem in problems]
        ids = [chat_ids(template, Chat([request])) for request in requests]
        controls = chat_controls(experiment.config, tokenizer, template)
    room = context_length(experiment.model)
    fits = [room is None or len(prompt) < room for prompt in ids]
    prompts = [p for p, fit in zip(ids, fits, strict=True) if fit for _ in range(n_samples)]
    found = (
        text_after(tokenizer, prompt, hypothesis.tokens)
        for prompt, (hypothesis, *_) in zip(
            prompts,
            sample_batches(
                experiment, params, prompts, sampling, seed, controls, progress=progress
            ),
            strict=True,
        )
    )
    return [
        _sample(problem, next(found) if fit else None, replies=template is not None)
        for problem, fit in zip(problems, fits, strict=True)
        for _ in range(n_samples)
    ]


def _sample(problem: Problem, text: str | None, replies: bool) -> Completion:
    if text is None:
        return Completion(problem, None)
    if replies:
        return Completion(problem, code_of(text), text)
    return Completion(problem, text_before(problem.stop, text))


def code_of(reply: str) -> str:
    """Return the first code block of a reply; the whole reply if there is none."""
    found = _BLOCK.search(reply)
    return found[1] if found else reply
