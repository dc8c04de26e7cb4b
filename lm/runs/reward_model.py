"""Reward model loaded from a run: scores completions of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, cast

import flax.linen as nn
import jax
import numpy as np

from lm.data.chat.chat_template import ChatTemplate
from lm.data.chat.preference_rows import PreferenceEncoder, Text
from lm.errors import UserError
from lm.models.variables import as_variables
from lm.objectives.preferences import HALVES
from lm.objectives.reward import Reward
from lm.runs.checkpoints import ignore_line
from lm.runs.saved_params import load_tokenizer, restore_run
from lm.runs.text_classifier import run_weights_digest
from lm.runs.workdir import load_run_config
from lm.storage import open_run_folder

_ROWS = 8  # pairs of completions scored per batch


class RewardModel:
    """Scorer of completions.

    Attributes:
        digest: digest of the weights.
    """

    def __init__(self, workdir: str):
        """Load the newest checkpoint of a run of `objective.name=reward` on all devices.

        Args:
            workdir: folder of the run.

        Raises:
            UserError: the run does not exist, or has another objective.
        """
        folder = open_run_folder(workdir)
        name = load_run_config(folder, {}).objective.name
        if name != "reward":
            raise UserError(f"{workdir}: its objective is {name}, not reward")
        self._experiment, self._params, _ = restore_run(folder, {}, ignore_line, any_batch=True)
        self._objective = cast(Reward, self._experiment.objective)
        tokenizer = load_tokenizer(folder)
        self._encoder = PreferenceEncoder(tokenizer, ChatTemplate.of(tokenizer))
        self.digest = run_weights_digest(workdir)

    def scores(self, pairs: Sequence[tuple[Text, Text]]) -> np.ndarray:
        """Return float32 rewards [n] of completions of prompts.

        Inputs longer than the model's sequence length lose their beginning.

        Args:
            pairs: prompt and completion, both texts or both lists of messages.
        """
        tokens = [self._encoder.whole(*pair, tools=None) for pair in pairs]
        parts = [self._predict(self._params, rows) for rows in self._batches(tokens)]
        return np.concatenate([np.zeros(0, np.float32), *parts])[: len(pairs)]

    def _batches(self, tokens: list[np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        size = _ROWS * HALVES
        for start in range(0, len(tokens), size):
            part = tokens[start : start + size]
            filled = [*part, *[part[-1]] * (size - len(part))]
            rows = [self._objective.row(filled[i : i + HALVES]) for i in range(0, size, HALVES)]
            yield {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    @cached_property
    def _predict(self) -> Any:
        predict = nn.apply(self._objective.predict, self._experiment.model)
        compiled = jax.jit(lambda params, batch: predict(as_variables(params), batch).reshape(-1))
        return lambda params, batch: jax.device_get(compiled(params, batch))
