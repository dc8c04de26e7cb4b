"""Log-likelihoods of continuations: of every token, given a prompt and the tokens before it.

An encoder–decoder reads the prompt as its source. For an encoder, each token of the continuation is
masked in turn and scored given all others: the pseudo-log-likelihood of Salazar et al. 2020.

Shape letters: B rows, L length, S source length.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.data.special_tokens import special_tokens, target_start
from lm.data.tokenizer import Tokenizer
from lm.decoding.prompts import (
    TokenIds,
    check_ids,
    context_length,
    is_encoder_decoder,
    pad_ids,
    padded_length,
    prompt_ids,
    require_text_input,
    source_ids,
)
from lm.errors import UserError
from lm.experiment import Experiment
from lm.models.variables import Params, as_variables
from lm.objectives.losses import token_losses
from lm.objectives.objective import Batch, BoundModel
from lm.parallel.mesh import BATCH_AXES, use_mesh
from lm.parallel.pipeline import PipelineSchedule

_KERNEL_TILE = 128  # column multiple of the accelerators' fused kernels


class Request(NamedTuple):
    """Token ids to score, and unscored ids before them that start a decoder's row.

    For an encoder–decoder, `prompt` is the complete source; for an encoder, `continuation` is
    scored inside the tokenizer's template.
    """

    prompt: TokenIds
    continuation: TokenIds


class TokenScores(NamedTuple):
    """Scores of the tokens of a continuation.

    Attributes:
        log_likelihoods: float32 [n], in nats.
        greedy: bool [n]: no token of the vocabulary is more likely.
    """

    log_likelihoods: np.ndarray
    greedy: np.ndarray


def split_request(experiment: Experiment, tokenizer: Tokenizer, text: str, more: str) -> Request:
    """Tokenize a prompt and a continuation, as lm-eval does.

    A decoder's text is tokenized as a whole and split after the prompt's tokens. Trailing spaces of
    the prompt move to the continuation, because most vocabularies join them to the next word.

    Args:
        experiment: experiment on a mesh.
        tokenizer: its tokenizer.
        text: the prompt; "" for the start of a document.
        more: the continuation.
    """
    if experiment.config.model.family == "encoder":
        before = np.asarray(tokenizer.encode(text))
        return Request(before, np.asarray(tokenizer.encode(text + more))[len(before) :])
    kept = text.rstrip()
    rest = text[len(kept) :] + more
    if is_encoder_decoder(experiment.model):
        return Request(source_ids(tokenizer, kept, sys.maxsize), tokenizer.encode(rest))
    if not kept:
        return Request(first_ids(tokenizer), tokenizer.encode(rest))
    prompt = prompt_ids(tokenizer, kept)
    return Request(prompt, prompt_ids(tokenizer, text + more)[len(prompt) :])


def first_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that start a document: bos, or the eos of the previous one."""
    ids = prompt_ids(tokenizer, "")
    return ids if ids or tokenizer.eos_id is None else [tokenizer.eos_id]


def score(
    experiment: Experiment,
    params: Params,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    progress: Callable[[int], Any] = lambda n: None,
) -> list[TokenScores]:
    """Score continuations, in batches of similar length.

    Rows longer than the context lose tokens at the start of their prompts.

    Args:
        experiment: experiment on a mesh.
        params: parameters.
        tokenizer: its tokenizer.
        requests: prompts and continuations.
        progress: called with the number of rows in each finished batch.

    Raises:
        UserError: a continuation does not fit into the context, or has nothing before it.
    """
    make_rows = _rows_of(experiment, tokenizer)
    rows = [(n, row) for n, request in enumerate(requests) for row in make_rows(n, request)]
    order = sorted(range(len(rows)), key=lambda i: _size(rows[i][1]), reverse=True)
    batch_size = experiment.config.eval.batch_size
    found: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in requests]
    scored: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        batch = [rows[i][1] for i in numbers]
        scored |= zip(numbers, _score_rows(experiment, params, batch, batch_size), strict=True)
        progress(len(numbers))
    for i, (number, _) in enumerate(rows):
        found[number].append(scored[i])
    empty = np.zeros(0, np.float32), np.zeros(0, bool)
    return [TokenScores(*map(np.concatenate, zip(*(x or [empty]), strict=True))) for x in found]


@dataclass(frozen=True, eq=False)
class _Row:
    """Input and targets of a model row; `scored` selects the targets of interest."""

    inputs: np.ndarray
    targets: np.ndarray
    scored: slice
    source: np.ndarray | None = None
    n_prefix: int = 0  # inputs with bidirectional attention


def _size(row: _Row) -> tuple[int, int]:
    return len(row.inputs), 0 if row.source is None else len(row.source)


def _rows_of(
    experiment: Experiment, tokenizer: Tokenizer
) -> Callable[[int, Request], Iterator[_Row]]:
    """Return a function from a request and its index to its rows."""
    model, special = experiment.model, special_tokens(tokenizer)
    require_text_input(model, "lm score")
    start = target_start(tokenizer, experiment.config.data.target_prefix)
    context = experiment.config.model.max_length

    def check(number: int, request: Request, room: int) -> None:
        check_ids([request.prompt, request.continuation], model)
        if len(request.continuation) > room:
            raise UserError(
                f"text {number + 1} has {len(request.continuation)} tokens to score; "
                f"the context holds {room}"
            )

    def of_decoder(number: int, request: Request) -> Iterator[_Row]:
        check(number, request, context)
        if not len(request.prompt):
            raise UserError(
                f"text {number + 1}: its first token has no context, and the tokenizer has no "
                "start token: give a prompt"
            )
        ids = np.concatenate([request.prompt, request.continuation]).astype(np.int32)
        ids = ids[-(context + 1) :]
        n = len(request.continuation)
        n_prefix = len(ids) - n if experiment.objective.has_prefix else 0
        if n:
            yield _Row(ids[:-1], ids[1:], slice(len(ids) - 1 - n, None), n_prefix=n_prefix)

    def of_encoder_decoder(number: int, request: Request) -> Iterator[_Row]:
        check(number, request, context - len(start) + 1)
        inputs = np.concatenate([start, request.continuation]).astype(np.int32)
        source = np.asarray(request.prompt, np.int32)[-context:]
        if len(request.continuation):
            yield _Row(inputs[:-1], inputs[1:], slice(len(start) - 1, None), source)

    def of_encoder(number: int, request: Request) -> Iterator[_Row]:
        check(number, request, context - 2)
        n = len(request.continuation)
        before = np.asarray(request.prompt)[max(0, len(request.prompt) + n - context + 2) :]
        ids = np.concatenate([[special.cls], before, request.continuation, [special.sep]])
        ids = ids.astype(np.int32)
        for at in range(len(ids) - 1 - n, len(ids) - 1):
            masked = ids.copy()
            masked[at] = special.mask
            yield _Row(masked, ids, slice(at, at + 1))

    if is_encoder_decoder(model):
        return of_encoder_decoder
    return of_encoder if experiment.config.model.family == "encoder" else of_decoder


def _score_rows(
    experiment: Experiment, params: Params, rows: Sequence[_Row], batch_size: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return log-likelihoods and greediness of the scored targets of each row."""
    mesh, model = experiment.mesh, experiment.model
    filled = [*rows, *[rows[-1]] * (batch_size - len(rows))]
    tile = 0 if mesh.devices.flat[0].platform == "cpu" else _KERNEL_TILE

    def padded(ids: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        width = padded_length(max(tile, *map(len, ids)))
        return pad_ids(ids, min(width, context_length(model) or width), left=False)

    arrays = dict(zip(("inputs", "segment_ids"), padded([r.inputs for r in filled]), strict=True))
    arrays["targets"] = np.zeros_like(arrays["inputs"])
    for at, row in enumerate(filled):
        arrays["targets"][at, : len(row.targets)] = row.targets
    if experiment.objective.has_prefix:
        columns = np.arange(arrays["inputs"].shape[1])
        n_prefix = np.array([row.n_prefix for row in filled])
        arrays["prefix"] = (columns < n_prefix[:, None]).astype(np.int32)
    sources = [row.source for row in filled if row.source is not None]
    if sources:
        arrays["source"], arrays["source_segments"] = padded(sources)
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    batch = {
        name: jax.make_array_from_callback(x.shape, sharding, x.__getitem__)
        for name, x in arrays.items()
    }
    sequence, pipeline = experiment.config.parallel.sequence, experiment.pipeline
    losses = jax.device_get(_token_losses(model, mesh, sequence, pipeline, params, batch))
    return [
        (-nll[: len(row.inputs)][row.scored], correct[: len(row.inputs)][row.scored] > 0)
        for row, nll, correct in zip(rows, *losses, strict=False)
    ]


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _token_losses(
    model: nn.Module,
    mesh: Mesh,
    sequence: bool,
    pipeline: PipelineSchedule,
    params: Params,
    batch: Batch,
) -> tuple[jax.Array, jax.Array]:
    """Return negative log-likelihoods, and whether each target is the most likely, [B, L] each."""

    def losses(model: BoundModel, batch: Batch) -> tuple[jax.Array, jax.Array]:
        inputs, segments = batch["inputs"], batch["segment_ids"]
        if "source" in batch:
            x_BLD = model.decoder_hidden(
                batch["source"], inputs, batch["source_segments"], segments
            )
        else:
            prefix = {"prefix_BL": batch["prefix"]} if "prefix" in batch else {}
            x_BLD = model.hidden(inputs, None, segments, **prefix)
        found = token_losses(model, x_BLD, batch["targets"])
        return found.nll_BL, found.correct_BL

    with use_mesh(mesh, sequence, pipeline):
        found = nn.apply(losses, model)(as_variables(params), batch)
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.lax.with_sharding_constraint(found, (replicated,) * 2)
