"""Safety sets: their interface, and running those that fit a checkpoint."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from ml_collections import ConfigDict

from lm.config.registries import SAFETY_SETS
from lm.config.registry import listed
from lm.data.tokenizer import Tokenizer
from lm.decoding.prompts import is_encoder_decoder
from lm.errors import UserError
from lm.evaluation.likelihood import Request, TokenScores, score, split_request
from lm.experiment import Experiment
from lm.models.variables import Params

PREFIX = "eval/safety/"
Figures = dict[str, float]


@dataclass(frozen=True)
class Subject:
    """Checkpoint under evaluation.

    Attributes:
        experiment: experiment on a mesh.
        params: parameters.
        tokenizer: its tokenizer.
        progress: called with the number of further processed rows; may raise.
    """

    experiment: Experiment
    params: Params
    tokenizer: Tokenizer
    progress: Callable[[int], Any] = lambda n: None

    @property
    def config(self) -> ConfigDict:
        """Resolved configuration."""
        return self.experiment.config

    @property
    def has_likelihoods(self) -> bool:
        """True if the model was trained to predict the tokens of texts."""
        return self.experiment.objective.has_perplexity

    @property
    def is_encoder(self) -> bool:
        """True if log-likelihoods are pseudo-log-likelihoods."""
        return self.config.model.family == "encoder"

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[TokenScores]:
        """Score the second text of each pair, given the first.

        A decoder scores a text longer than the context in parts, each preceded by half a context.
        """
        experiment, tokenizer = self.experiment, self.tokenizer
        requests = [split_request(experiment, tokenizer, *pair) for pair in pairs]
        parts = [self._parts(request) for request in requests]
        flat = [part for of_text in parts for part in of_text]
        scores = iter(score(experiment, self.params, tokenizer, flat, self.progress))
        found = ([next(scores) for _ in of_text] for of_text in parts)
        return [TokenScores(*map(np.concatenate, zip(*some, strict=True))) for some in found]

    def _parts(self, request: Request) -> list[Request]:
        if self.is_encoder or is_encoder_decoder(self.experiment.model):
            return [request]
        # If the vocabulary has no start token, the text follows a newline.
        prompt = request.prompt if len(request.prompt) else self.tokenizer.encode("\n")
        context, n = self.config.model.max_length, len(request.continuation)
        if n <= context:
            return [request._replace(prompt=prompt)]
        ids, start = [*prompt, *request.continuation], len(prompt)
        at = range(start, start + n, max(context // 2, 1))
        return [Request(ids[:i], ids[i : min(i + at.step, start + n)]) for i in at]

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Return the log-likelihood of the second text of each pair given the first, in nats."""
        sums = [s.log_likelihoods.sum(dtype=np.float64) for s in self.score(pairs)]
        return np.array(sums, np.float64)

    def sample(self, items: Sequence[Any]) -> list[Any]:
        """Return up to `safety.limit` evenly spaced items, in order."""
        limit = self.config.safety.limit
        if not limit or len(items) <= limit:
            return list(items)
        return [items[i * len(items) // limit] for i in range(limit)]


class SafetySet(ABC):
    """Set of a safety suite, registered under its name in `SAFETY_SETS`.

    Attributes:
        about: meaning and caveats of the metrics, in a few sentences for the page.
        ideal: value of an unbiased model, drawn as a line; NaN: none.
        published: published values for the page, by model and source.
        curves: metrics with a common unit that the page plots; (): all except counts.
    """

    about: ClassVar[str]
    ideal: ClassVar[float] = math.nan
    published: ClassVar[dict[str, float]] = {}
    curves: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def misfit(self, subject: Subject) -> str:
        """Return why the set does not apply to a model or lacks its data; "" if it fits.

        Does not run the model.

        Raises:
            UserError: data cannot be read.
        """

    @abstractmethod
    def measure(self, subject: Subject) -> Figures:
        """Compute the metrics of a checkpoint by name."""


def require_sets(experiment: Experiment) -> None:
    """Raise UserError unless the sets of `--config.eval.safety` fit and have their data."""
    assert experiment.tokenizer is not None
    subject = Subject(experiment, {}, experiment.tokenizer)
    for name in listed(subject.config.eval.safety):
        try:
            problem = SAFETY_SETS[name]().misfit(subject)
        except UserError as error:
            problem = str(error)
        if problem:
            raise UserError(f"--config.eval.safety={name}: {problem}")


def safety_figures(subject: Subject, note: Callable[[str], Any], require: bool = False) -> Figures:
    """Run the sets of `--config.eval.safety`.

    Args:
        subject: checkpoint.
        note: called with a line for each set that does not fit or whose data cannot be read.
        require: raise an error for such a set.

    Returns:
        Metrics as "eval/safety/SET/FIGURE"; undefined ones are omitted.

    Raises:
        UserError: a set does not fit, with `require`.
    """
    figures: Figures = {}
    for name in listed(subject.config.eval.safety):
        one: SafetySet = SAFETY_SETS[name]()
        try:
            if why := one.misfit(subject):
                raise UserError(why)
            found = one.measure(subject)
        except UserError as error:
            if require:
                raise UserError(f"safety set {name}: {error}") from error
            note(f"safety set {name} is skipped: {error}")
            continue
        figures |= {f"{PREFIX}{name}/{key}": x for key, x in found.items() if math.isfinite(x)}
    return figures


def with_decode_length(experiment: Experiment, n_new: int) -> Experiment:
    """Return the experiment with `decode.max_length` limited to `n_new`, one hypothesis."""
    config = experiment.config.copy_and_resolve_references()
    config.decode.max_length, config.decode.beam_size = n_new, 1
    return replace(experiment, config=config)
