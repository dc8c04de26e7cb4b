"""Log-probabilities of prompt tokens, in one forward pass.

Shape letters: L length, C listed tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lm.decoding.engine.adapters import Adapters
from lm.decoding.engine.requests import NewToken
from lm.decoding.prompts import (
    check_ids,
    check_prompts,
    context_length,
    is_encoder_decoder,
    pad_ids,
    padded_length,
)
from lm.errors import UserError
from lm.experiment import Experiment
from lm.models.variables import Params, as_variables
from lm.parallel.mesh import use_mesh


def prompt_logprobs(
    experiment: Experiment,
    params: Params,
    prompt: Sequence[int],
    n_top: int,
    adapters: Adapters | None = None,
    adapter: int = 0,
) -> list[NewToken]:
    """Return the tokens of a prompt with log-probabilities; None for the first one.

    Args:
        experiment: experiment on a mesh, prepared for decoding.
        params: parameters.
        prompt: token ids.
        n_top: number of top tokens to list per position.
        adapters: low-rank adapters, or None.
        adapter: index of the adapter to apply.

    Raises:
        UserError: the prompt is empty or too long, or the model does not continue prompts.
    """
    model, context = experiment.model, context_length(experiment.model)
    if is_encoder_decoder(model) or experiment.objective.has_prefix:
        raise UserError("this model reads prompts bidirectionally: tokens have no probabilities")
    check_ids([prompt], model)
    check_prompts([prompt], context and context + 1)
    width = padded_length(len(prompt))
    tokens_1L, _ = pad_ids([prompt], min(width, context or width), left=False)
    n_top = min(n_top, model.config.vocab_size)  # type: ignore[attr-defined]
    with use_mesh(experiment.mesh, experiment.config.parallel.sequence, experiment.pipeline):
        found = _token_logprobs(model, n_top, params, tokens_1L, adapters, np.array([adapter]))
    logprobs_L, ids_LC, top_LC = jax.device_get(found)
    tokens = [NewToken(prompt[0])]
    for i, token in enumerate(prompt[1:]):
        top = tuple(zip(ids_LC[i].tolist(), top_LC[i].tolist(), strict=True))
        tokens.append(NewToken(token, float(logprobs_L[i]), top))
    return tokens


@partial(jax.jit, static_argnums=(0, 1))
def _token_logprobs(
    model: nn.Module,
    n_top: int,
    params: Params,
    tokens_1L: jax.Array,
    adapters: Adapters | None,
    adapter_1: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the log-probability of each token after the first, and the top tokens there."""
    adapted = nn.intercept_methods(adapters.interceptor(adapter_1)) if adapters else nullcontext()
    with adapted:
        logits_1LV: Any = model.apply(as_variables(params), tokens_1L)
    logprobs_LV = jax.nn.log_softmax(logits_1LV[0, :-1].astype(jnp.float32))
    of_tokens_L1 = jnp.take_along_axis(logprobs_LV, tokens_1L[0, 1:, None], axis=1)
    top_LC, ids_LC = jax.lax.top_k(logprobs_LV, n_top)
    return of_tokens_L1[:, 0], ids_LC, top_LC
