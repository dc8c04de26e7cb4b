"""Per-row options on the host, sent to the device when they change."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from lm.decoding.engine.requests import MOST_LOGPROBS, GenerationRequest
from lm.decoding.engine.row_sampling import RowOptions
from lm.errors import UserError

MOST_ENDS, MOST_BIASED = 16, 512  # per request
_WORD = 0xFFFFFFFF


class OptionTable:
    """Options of all rows as arrays."""

    def __init__(self, n_rows: int, vocab_size: int):
        """Create a table with default options."""
        self._vocab_size = vocab_size
        self._device: RowOptions | None = None

        def full(value: float, dtype: Any = np.int32, *shape: int) -> np.ndarray:
            return np.full((n_rows, *shape), value, dtype)

        options: dict[str, Any] = {
            "keys_B2": full(0, np.uint32, 2),
            "numbers_B": full(0),
            "n_prompt_B": full(0),
            "limits_B": full(0),
            "min_new_B": full(0),
            "top_k_B": full(0),
            "end_ids_BE": full(-1, np.int32, MOST_ENDS),
            "n_listed_B": full(-1),
            "adapters_B": full(0),
            "temperature_B": full(0, np.float32),
            "top_p_B": full(1, np.float32),
            "min_p_B": full(0, np.float32),
            "repetition_B": full(1, np.float32),
            "presence_B": full(0, np.float32),
            "frequency_B": full(0, np.float32),
            "bias_ids_BN": full(-1, np.int32, MOST_BIASED),
            "bias_BN": full(0, np.float32, MOST_BIASED),
        }
        self._host = RowOptions(**options)

    @property
    def on_device(self) -> RowOptions:
        """Options as device arrays."""
        if self._device is None:
            self._device = jax.tree.map(np.copy, self._host)  # not the arrays that `set` modifies
            self._device = jax.device_put(self._device)
        return self._device

    def check(self, request: GenerationRequest) -> None:
        """Raise UserError for an option outside its limits."""
        r = request
        numbers = {
            "temperature": (r.temperature, 0, math.inf),
            "top_p": (r.top_p, 0, 1),
            "min_p": (r.min_p, 0, 1),
            "top_k": (r.top_k, 0, math.inf),
            "repetition_penalty": (r.repetition_penalty, 1e-6, math.inf),
            "presence_penalty": (r.presence_penalty, -math.inf, math.inf),
            "frequency_penalty": (r.frequency_penalty, -math.inf, math.inf),
            "max_new_tokens": (r.max_new_tokens, 1, math.inf),
            "top_logprobs": (0 if r.top_logprobs is None else r.top_logprobs, 0, MOST_LOGPROBS),
            "the number of end tokens": (len(r.end_ids), 0, MOST_ENDS),
            "the number of tokens in logit_bias": (len(r.logit_bias), 0, MOST_BIASED),
        }
        for name, (value, low, high) in numbers.items():
            if not low <= value <= high or math.isinf(value):
                limits = f"from {low}" + (f" to {high}" if high < math.inf else "")
                raise UserError(f"{name} is {value}, but must be {limits}")
        if not all(map(math.isfinite, r.logit_bias.values())):
            raise UserError("logit_bias has a value that is not finite")
        ids = (*r.logit_bias, *r.end_ids)
        if unknown := next((i for i in ids if not 0 <= i < self._vocab_size), None):
            raise UserError(
                f"token id {unknown} does not exist; the vocabulary has {self._vocab_size} tokens"
            )

    def set(self, row: int, request: GenerationRequest, seed: int, adapter: int) -> None:
        """Set the options of a row.

        Args:
            row: row index.
            request: the request.
            seed: its seed, or the drawn one.
            adapter: adapter index.
        """
        r, self._device = request, None
        values: dict[str, Any] = {
            "keys_B2": (seed >> 32 & _WORD, seed & _WORD),
            "numbers_B": r.number,
            "n_prompt_B": len(r.prompt),
            "limits_B": r.max_new_tokens,
            "min_new_B": r.min_new_tokens,
            "top_k_B": min(r.top_k, self._vocab_size),
            "end_ids_BE": _padded(r.end_ids, MOST_ENDS, -1),
            "n_listed_B": -1 if r.top_logprobs is None else r.top_logprobs,
            "adapters_B": adapter,
            "temperature_B": r.temperature,
            "top_p_B": r.top_p,
            "min_p_B": r.min_p,
            "repetition_B": r.repetition_penalty,
            "presence_B": r.presence_penalty,
            "frequency_B": r.frequency_penalty,
            "bias_ids_BN": _padded(tuple(r.logit_bias), MOST_BIASED, -1),
            "bias_BN": _padded(tuple(r.logit_bias.values()), MOST_BIASED, 0),
        }
        for name, value in values.items():
            getattr(self._host, name)[row] = value


def _padded(values: tuple[float, ...], length: int, fill: float) -> list[float]:
    return [*values, *[fill] * (length - len(values))]
