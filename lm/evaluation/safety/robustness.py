"""Robustness: task accuracy under typos and different prompt templates.

The task is a classifier's own validation records, or a multiple-choice file scored by
log-likelihood: `{"question": …, "choices": [TEXT, …], "answer": INDEX}` per line, whose fields
templates can use.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import numpy as np

from lm.data.files import find_file, read_lines
from lm.data.records import Row, read_jsonl_rows
from lm.data.splits import open_split
from lm.errors import UserError
from lm.evaluation.safety.bias import NO_LIKELIHOODS
from lm.evaluation.safety.suite import Figures, SafetySet, Subject
from lm.runs.text_classifier import TextClassifier

_WORD = re.compile(r"[^\W\d_]{4,}")
_TEXT = "text"  # text column of a classifier's records


class Item(NamedTuple):
    """Question of a task.

    Attributes:
        fields: texts by field name, for templates.
        choices: answers; (): the classes of a classifier.
        answer: index of the correct answer.
    """

    fields: Mapping[str, str]
    choices: tuple[str, ...]
    answer: int


def with_typos(text: str, rate: float, seed: object = 0) -> str:
    """Insert a typo into some of the words with at least four letters.

    A typo drops, doubles or swaps inner letters; it is deterministic given text and seed.

    Args:
        text: the text.
        rate: probability of a typo per word.
        seed: any value.
    """
    draw = random.Random(f"{seed} {text}")

    def typo(match: re.Match[str]) -> str:
        word = match.group()
        if draw.random() >= rate:
            return word
        at = draw.randrange(1, len(word) - 1)
        first, second, rest = word[:at], word[at], word[at + 1 :]
        changed = (first + rest, first + 2 * second + rest, first + rest[0] + second + rest[1:])
        return changed[draw.randrange(3)]

    return _WORD.sub(typo, text)


class Robustness(SafetySet):
    """Accuracy under typos and prompt templates."""

    about: ClassVar = (
        "Accuracy in percent: of a classifier on its validation records, else on the questions of "
        "safety.task, answered by the choice with the highest likelihood per byte. “typos”: with "
        "a typo in a fraction safety.typos of the words with at least four letters. “worst”, "
        "“mean”: over the prompt templates of safety.templates."
    )

    def misfit(self, subject: Subject) -> str:
        if _is_classifier(subject):
            data = subject.config.data
            if not subject.experiment.objective.class_names:
                return "the classifier has no --config.data.labels"
            if data.multi_label:
                return "a text has any number of labels"
            has_some = data.validation_source or data.validation_fraction
            return "" if has_some else "the run has no validation data"
        if not subject.config.safety.task:
            return "needs a file of multiple-choice questions (--config.safety.task)"
        if not subject.has_likelihoods:
            return NO_LIKELIHOODS
        return "" if read_items(subject) else "no question"

    def measure(self, subject: Subject) -> Figures:
        options, data = subject.config.safety, subject.config.data
        items, answer = _task(subject)
        field = _TEXT if _is_classifier(subject) else "question"
        templates = [f"{{{field}}}"]
        if options.templates:
            lines = [x for x in read_lines(find_file(options.templates, data)) if x.strip()]
            templates = lines or templates
        figures: Figures = {"samples": len(items)}
        found: dict[str, list[float]] = {"accuracy": [], "typos": []}
        right = np.array([item.answer for item in items])
        for number, template in enumerate(templates, 1):
            prompts = [_fill(template, item.fields) for item in items]
            rates = {"accuracy": 0.0, "typos": options.typos}
            for name, rate in rates.items():
                asked = [with_typos(prompt, rate) for prompt in prompts] if rate else prompts
                share = 100 * float((answer(asked, items) == right).mean())
                found[name].append(share)
                if len(templates) > 1:
                    figures[f"{name}/template {number}"] = share
        for name, shares in found.items():
            figures[name] = shares[0]
            if len(shares) > 1:
                figures[f"{name}_mean"] = float(np.mean(shares))
                figures[f"{name}_worst"] = min(shares)
        return figures


Answer = Callable[[Sequence[str], Sequence[Item]], np.ndarray]


def _is_classifier(subject: Subject) -> bool:
    objective = subject.experiment.objective
    return hasattr(objective, "labels") and objective.columns[:1] == (_TEXT,)


def _task(subject: Subject) -> tuple[list[Item], Answer]:
    """Return the items of the task, and a function from prompts to answer indices."""
    if not _is_classifier(subject):
        return subject.sample(read_items(subject)), partial(_choose, subject)
    classifier = TextClassifier(subject.experiment, subject.params, subject.tokenizer)
    stores: Any = open_split(
        subject.config.data, "validation", subject.tokenizer, columns=("text", "label")
    )
    columns = range(len(classifier.labels))
    items = [
        Item({_TEXT: record.raw[_TEXT]}, (), list(classifier.labels).index(record.raw["label"]))
        for record in chain.from_iterable(stores)
    ]

    def classify(prompts: Sequence[str], items: Sequence[Item]) -> np.ndarray:
        return classifier.largest(prompts, columns)[1].argmax(-1)

    return subject.sample(items), classify


def _choose(subject: Subject, prompts: Sequence[str], items: Sequence[Item]) -> np.ndarray:
    """Return the index of the choice with the highest likelihood per byte for each prompt."""
    pairs = [
        (prompt, f" {choice}")
        for prompt, item in zip(prompts, items, strict=True)
        for choice in item.choices
    ]
    scores = subject.log_likelihoods(pairs) / [len(choice.encode()) for _, choice in pairs]
    ends = np.cumsum([len(item.choices) for item in items])
    return np.array([part.argmax() for part in np.split(scores, ends[:-1])])


def _fill(template: str, fields: Mapping[str, str]) -> str:
    r"""Fill the fields of an item into a template; "\n" in it is a newline."""
    try:
        return template.replace(r"\n", "\n").format_map(fields)
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise UserError(
            f"--config.safety.templates: {template!r} is invalid; known fields: {', '.join(fields)}"
        ) from error


def read_items(subject: Subject) -> list[Item]:
    """Read the items of the file `--config.safety.task`.

    Raises:
        UserError: the file cannot be read, or a line is not a valid item.
    """
    path = find_file(subject.config.safety.task, subject.config.data)
    items = [_item(row) for row in read_jsonl_rows(path)]
    if not items:
        raise UserError(f"{path}: no questions")
    return items


def _item(row: Row) -> Item:
    choices, answer = row.values.get("choices"), row.values.get("answer")
    fields = {name: value for name, value in row.values.items() if isinstance(value, str)}
    problem = row.problem
    is_list = isinstance(choices, list) and len(choices) > 1
    if not problem and not (is_list and all(isinstance(x, str) and x for x in choices or ())):
        problem = "'choices' must be two texts or more"
    if not problem and not (type(answer) is int and 0 <= answer < len(choices or ())):
        problem = "'answer' must be the index of a choice"
    if not problem and not isinstance(fields.get("question"), str):
        problem = "no text in a field 'question'"
    if problem:
        raise UserError(f"{row.where}: {problem}")
    assert isinstance(choices, list)
    assert isinstance(answer, int)
    return Item(fields, tuple(choices), answer)
