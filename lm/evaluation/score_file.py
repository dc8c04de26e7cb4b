"""Continuation scores for every line of a file (`lm score --input FILE`).

Repeating the command resumes the output, as in `lm/decoding/generate_file.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm.data.records import Row, read_jsonl_rows
from lm.data.tokenizer import Tokenizer
from lm.decoding.generate_file import continue_file
from lm.errors import UserError
from lm.evaluation.likelihood import Request, TokenScores, score, split_request
from lm.experiment import Experiment
from lm.models.variables import Params
from lm.parallel.mesh import is_primary_host
from lm.progress import progress_bar

_WINDOW = 256  # lines sorted by length together; a crash loses up to this many


@dataclass(frozen=True)
class Question:
    """Prompt and continuations to score; without a prompt, they are whole texts."""

    prompt: str
    continuations: tuple[str, ...]


def score_file(
    experiment: Experiment,
    params: Params,
    tokenizer: Tokenizer,
    input: Path,
    output: Path | None,
    weights: Mapping[str, Any],
) -> None:
    """Write the scores of each line of a file, or the missing ones.

    Args:
        experiment: experiment on a mesh.
        params: parameters.
        tokenizer: its tokenizer.
        input: file of `Question`s, one JSON object per line.
        output: file to write, one JSON object per line; None: stdout.
        weights: identity of the parameters; an output is resumed only with the same.
    """
    questions = read_questions(input)

    def lines_from(start: int) -> Iterable[str]:
        with progress_bar("scoring", len(questions), initial=start, shown=is_primary_host()) as bar:
            for first in range(start, len(questions), _WINDOW):
                window = questions[first : first + _WINDOW]
                for record in score_questions(experiment, params, tokenizer, window):
                    yield json.dumps(record, ensure_ascii=False)
                bar.update(len(window))

    if output is not None:
        texts = [json.dumps([q.prompt, *q.continuations]) for q in questions]
        continue_file(output, texts, weights, lines_from)
        return
    for line in lines_from(0):
        if is_primary_host():
            print(line, flush=True)


def read_questions(file: Path) -> list[Question]:
    """Read a file with one JSON object per line, possibly compressed.

    Raises:
        UserError: the file cannot be read, or a line is invalid.
    """
    if not file.is_file():
        raise UserError(f"no file {file}")
    return [_question(row) for row in read_jsonl_rows(file)]


def _question(row: Row) -> Question:
    prompt, given = row.values.get("prompt", ""), row.values.get("continuations")
    texts: list[Any] = given if isinstance(given, list) else [given] if given else []
    problem = row.problem
    if not problem and not texts:
        problem = "no list of texts in a field 'continuations'"
    if not problem and not all(isinstance(text, str) for text in (prompt, *texts)):
        problem = "'prompt' and 'continuations' must be texts"
    if problem:
        raise UserError(f"{row.where}: {problem}")
    try:
        "".join((prompt, *texts)).encode()
    except UnicodeEncodeError:
        raise UserError(f"{row.where}: a lone surrogate is not valid text") from None
    return Question(prompt, tuple(texts))


def score_questions(
    experiment: Experiment, params: Params, tokenizer: Tokenizer, questions: Sequence[Question]
) -> Iterator[dict[str, Any]]:
    """Yield the scores of each question's continuations, as JSON values.

    "log_likelihood" of a continuation is the sum of "log_likelihoods" over its "tokens"; "greedy"
    says whether greedy decoding would generate it. "best" is the index of the most likely
    continuation, "best_by_byte" of the one with the largest log-likelihood per UTF-8 byte.
    """
    requests = [
        split_request(experiment, tokenizer, question.prompt, text)
        for question in questions
        for text in question.continuations
    ]
    scores = iter(zip(requests, score(experiment, params, tokenizer, requests), strict=True))
    for question in questions:
        found = [_as_json(tokenizer, text, *next(scores)) for text in question.continuations]
        sums = [one["log_likelihood"] for one in found]
        sizes = [max(len(text.encode()), 1) for text in question.continuations]
        yield {
            "prompt": question.prompt,
            "continuations": found,
            "best": int(np.argmax(sums)),
            "best_by_byte": int(np.argmax(np.divide(sums, sizes))),
        }


def _as_json(
    tokenizer: Tokenizer, text: str, request: Request, scores: TokenScores
) -> dict[str, Any]:
    return {
        "text": text,
        "log_likelihood": float(scores.log_likelihoods.sum(dtype=np.float64)),
        "greedy": bool(scores.greedy.all()),
        "tokens": [tokenizer.decode([int(i)]) for i in request.continuation],
        "log_likelihoods": [round(float(x), 6) for x in scores.log_likelihoods],
    }
