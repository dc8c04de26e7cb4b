"""Analysis of one text: predictions, their attribution, and internal states.

An encoder's tokens are masked in turn and predicted from all others, as in
`lm/evaluation/likelihood.py`; attention and norms are those of the unmasked text.

Shape letters: R rows, Q predictions, L length, S source length, D model, W width of the residual
stream, V vocabulary, N layers, K alternatives, X tokens read by the end of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lm.data.record_store import Record
from lm.data.special_tokens import special_tokens, target_start
from lm.data.tokenizer import Tokenizer
from lm.decoding.batch import decode_best
from lm.decoding.beam import BeamOptions
from lm.decoding.prompts import (
    check_ids,
    context_length,
    is_encoder_decoder,
    prompt_ids,
    require_text_input,
    source_ids,
)
from lm.errors import UserError
from lm.experiment import Experiment
from lm.insight.capture import has_all_params, require_transformer, run_and_capture
from lm.models.transformer import Stack
from lm.models.variables import Params, as_variables
from lm.objectives.classification import Classification

MOST_TOKENS = 512  # maximum tokens shown: maps grow quadratically
N_ALTERNATIVES, N_LENS = 10, 3
_CAPTURED = ("attention", "cross_attention", "residual", "updates")
_MULTIPLE = 16  # padding multiple of lengths, to limit the number of compiled programs
_MASKS = ("[MASK]", "<mask>")


@dataclass(frozen=True)
class Passage:
    """Token ids of a text as model input, and what to predict.

    Attributes:
        tokens: input of a decoder or encoder [L]; for an encoder–decoder the target, after its
            start id.
        positions: columns of `tokens` with a prediction [Q].
        targets: target ids of the predictions [Q]; -1: unknown, use the most likely one.
        source: encoder input [S] of an encoder–decoder.
        mask: id that replaces a predicted token in an encoder; -1 for others.
        n_prefix: number of tokens with bidirectional attention (prefix LM).
        classes: class names, if a class of the text is predicted instead of tokens.
        multi_label: whether each class has a probability of its own.
    """

    tokens: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    source: np.ndarray | None = None
    mask: int = -1
    n_prefix: int = 0
    classes: tuple[str, ...] = ()
    multi_label: bool = False


@flax.struct.dataclass
class PredictionScores:
    """Scores of predictions, from their logits.

    Attributes:
        loss: negative log-likelihood of the target in nats; of the most likely id if unknown.
        rank: rank of the target in the vocabulary, from 1.
        entropy: entropy of the distribution in nats.
        ids: most likely ids in descending order [..., K].
        probabilities: their probabilities.
    """

    loss: Any
    rank: Any
    entropy: Any
    ids: Any
    probabilities: Any


@flax.struct.dataclass
class Predictions:
    """Predictions of a passage.

    Attributes:
        scores: scores of each prediction, [Q].
        lens: logit lens (nostalgebraist 2020): scores of the same targets if the model ended after
            the embedding, and after each layer, [Q, N+1].
        attribution: gradient × input (Shrikumar et al. 2016) of the target's log-likelihood, by
            token [Q, L].
        source_attribution: same by source token [Q, S], or None.
    """

    scores: PredictionScores
    lens: PredictionScores
    attribution: Any
    source_attribution: Any = None


@dataclass(frozen=True)
class Reading:
    """Results of a model for a passage.

    Attributes:
        passage: the passage.
        predictions: its predictions; None for a model without output vocabulary.
        arrays: attention maps [N, H, L, S] by name, "attention" and "cross_attention", and vector
            norms: "residual" [N+1, L] and "updates" [N, U, L]; see `CAPTURES`.
    """

    passage: Passage
    predictions: Predictions | None
    arrays: Mapping[str, Any]


# --- texts to passages


def make_passage(
    experiment: Experiment, params: Params, tokenizer: Tokenizer, text: str, target: str | None
) -> Passage:
    """Build the passage of a text.

    Args:
        experiment: experiment on a mesh.
        params: parameters, by which an encoder–decoder generates a missing target.
        tokenizer: its tokenizer.
        text: the text; the source of an encoder–decoder; "[MASK]" is an encoder's mask.
        target: target of an encoder–decoder, or continuation of a decoder.

    Raises:
        UserError: a text is empty, too long or not UTF-8, or the model takes no target.
    """
    model, special = experiment.model, special_tokens(tokenizer)
    require_transformer(model)
    require_text_input(model, "lm inspect")
    try:
        (text + (target or "")).encode()
    except UnicodeEncodeError:
        raise UserError("it is not valid UTF-8") from None
    objective, has_heads = experiment.objective, has_all_params(experiment, params)
    source: np.ndarray | None = None
    tokens: Any
    mask, n_prefix = -1, 0
    if isinstance(objective, Classification) and not is_encoder_decoder(model):
        if target is not None:
            raise UserError("classifiers do not support --target")
        record = Record({}, {"text": tokenizer.encode(text)}, None, None)
        tokens = _checked("prompt", objective.row(record)[0].tolist(), model)
        one = np.zeros(1 if has_heads and objective.labels else 0, np.int32)
        passage = Passage(tokens, one, one - 1, classes=objective.labels)
        return replace(passage, multi_label=objective.multi_label)
    if is_encoder_decoder(model):
        source = _checked("source", source_ids(tokenizer, text, 10**9), model)
        if target is None:
            options = BeamOptions.from_config(experiment.config, tokenizer)
            (found,) = decode_best(experiment, params, tokenizer, [source], options)
        else:
            found = list(tokenizer.encode(target))
        start = target_start(tokenizer, experiment.config.data.target_prefix)
        tokens = _checked("target", [*start, *found], model)
        targets = [*tokens[1:], special.eos]
        if not objective.has_perplexity:  # encoder and decoder read the same text
            tokens, source = source, None
    elif experiment.config.model.family == "encoder":
        if target is not None:
            raise UserError("encoders do not support --target")
        ids = [special.cls, *_with_masks(tokenizer, text, special.mask), special.sep]
        tokens, mask = _checked("prompt", ids, model), special.mask
        targets = [-1 if i == mask else i for i in tokens]
    else:
        tokens = _checked("prompt", prompt_ids(tokenizer, text + (target or "")), model)
        if objective.has_prefix and target is not None:
            n_prefix = len(prompt_ids(tokenizer, text))
        targets = [*tokens[1:], -1]
    positions = np.arange(len(tokens), dtype=np.int32)
    if mask >= 0:
        positions = positions[1:-1]
    n_rows = model.config.vocab_size  # type: ignore[attr-defined]
    if not (objective.has_perplexity and has_heads) or mask >= n_rows:
        positions = positions[:0]
    chosen = np.asarray(targets, np.int32)[positions]
    return Passage(tokens, positions, chosen, source, mask, n_prefix)


def _checked(what: str, ids: Sequence[int], model: nn.Module) -> np.ndarray:
    """Validate token ids; UserError if empty, too many, or beyond the vocabulary."""
    most = min(MOST_TOKENS, context_length(model) or MOST_TOKENS)
    if not ids:
        raise UserError(f"the {what} is empty, and the tokenizer has no start token")
    if len(ids) > most:
        raise UserError(f"the {what} has {len(ids)} tokens; at most {most} can be shown")
    check_ids([ids], model)
    return np.asarray(ids, np.int32)


def _with_masks(tokenizer: Tokenizer, text: str, mask: int) -> list[int]:
    """Tokenize a text in which "[MASK]" or "<mask>" stands for the mask."""
    name = next((name for name in _MASKS if name in text), _MASKS[0])
    first, *others = text.split(name)
    ids = list(map(int, tokenizer.encode(first.rstrip() if others else first)))
    for part in others:
        ids += [mask, *map(int, tokenizer.encode(part))]
    return ids


def token_texts(tokenizer: Tokenizer, anchor: Sequence[int]) -> Callable[[int], str]:
    """Return a function from an id to its text, including its leading space.

    Args:
        tokenizer: the tokenizer.
        anchor: ids of any text; a token's text is what it adds to one of them, because a space may
            depend on the previous token.
    """
    special = special_tokens(tokenizer)
    names = {getattr(special, n): f"[{n}]" for n in ("pad", "mask", "sep", "cls", "eos", "bos")}
    names_of_bytes = {tokenizer.token_id(f"<0x{byte:02X}>"): f"<{byte:02X}>" for byte in range(256)}
    known = (int(i) for i in anchor if i < tokenizer.vocab_size)
    before = next(([i] for i in known if tokenizer.decode([i]).strip().strip("\ufffd")), [])
    start = tokenizer.decode(before)
    texts: dict[int, str] = {}

    def text_of(number: int) -> str:
        if number not in texts:
            inside = number < tokenizer.vocab_size
            text = tokenizer.decode([*before, number])[len(start) :] if inside else ""
            if number in names and not text.isspace():
                text = text.strip()  # a name such as " [CLS]", or nothing
            if text == "\ufffd":
                text = names_of_bytes.get(number, text)
            texts[number] = text or names.get(number) or f"#{number}"
        return texts[number]

    return text_of


# --- passages to readings


class _Rows(flax.struct.PyTreeNode):
    """Arrays of a passage: input rows, and what to predict in each.

    `prefix` and `source` may be None; the source is shared by all rows.
    """

    tokens_RL: Any
    segments_RL: Any
    positions_RQ: Any
    targets_RQ: Any
    prefix_L: Any = None
    source_S: Any = None
    source_segments_S: Any = None
    is_class: bool = flax.struct.field(pytree_node=False, default=False)
    multi_label: bool = flax.struct.field(pytree_node=False, default=False)


def read(experiment: Experiment, params: Params, passage: Passage) -> Reading:
    """Run the model on a passage.

    Args:
        experiment: experiment on a mesh.
        params: its parameters.
        passage: the passage.
    """
    model, variables = experiment.model, as_variables(params)
    n, n_predictions = len(passage.tokens), len(passage.positions)
    rows = _rows(passage, model)
    plain = _rows(Passage(passage.tokens, *(np.zeros(0, np.int32),) * 2, passage.source), model)
    plain = plain.replace(prefix_L=rows.prefix_L)
    predicts = n_predictions > 0 and not passage.classes
    arrays = jax.device_get(_arrays(model, variables, plain, predicts))
    n_source = n if passage.source is None else len(passage.source)

    def cut(path: str, x: np.ndarray) -> np.ndarray:
        in_source = path.startswith("encoder/")
        queries = n_source if in_source else n
        if not path.endswith("attention"):
            return x[..., :queries]
        keys = n_source if in_source or path.endswith("cross_attention") else n
        return x[..., :queries, :keys]

    arrays = {path: cut(path, x) for path, x in arrays.items()}
    if not n_predictions:
        return Reading(passage, None, arrays)
    found = jax.device_get(_predict(model, variables, rows))
    found = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n_predictions], found)
    of_source = found.source_attribution
    found = found.replace(
        attribution=found.attribution[:, :n],
        source_attribution=None if of_source is None else of_source[:, :n_source],
    )
    return Reading(passage, found, arrays)


def _rows(passage: Passage, model: nn.Module) -> _Rows:
    """Return the padded arrays of a passage: one row, or for an encoder one per prediction."""
    context = context_length(model)

    def padded(ids: np.ndarray, fill: int = 0) -> np.ndarray:
        width = max(1, -(-len(ids) // _MULTIPLE) * _MULTIPLE)
        return np.pad(ids, (0, min(width, context or width) - len(ids)), constant_values=fill)

    positions, targets = passage.positions, passage.targets
    if not passage.classes:
        positions, targets = padded(positions), padded(targets, -1)
    tokens, segments = padded(passage.tokens), padded(np.ones(len(passage.tokens), np.int32))
    prefix = (np.arange(len(tokens)) < passage.n_prefix).astype(np.int32)
    source = passage.source
    of_source: dict[str, Any] = {}
    if source is not None:
        of_source = {"source_S": padded(source)}
        of_source["source_segments_S"] = padded(np.ones(len(source), np.int32))
    if passage.mask < 0:
        parts = (tokens[None], segments[None], positions[None], targets[None])
        prefixed = prefix if passage.n_prefix else None
        rows = _Rows(*parts, prefix_L=prefixed, is_class=bool(passage.classes), **of_source)
        return rows.replace(multi_label=passage.multi_label)
    masked = np.tile(tokens, (len(positions), 1))
    masked[np.arange(len(positions)), positions] = passage.mask
    return _Rows(masked, np.tile(segments, (len(masked), 1)), positions[:, None], targets[:, None])


def _call(model: Any, rows: _Rows, tokens_BL: Any, segments_BL: Any, predicts: bool = True) -> Any:
    """Run a bound model on token rows; return logits [B, L, V], or hidden states.

    Class logits are [B, 1, C].
    """
    if rows.is_class:
        x_BLD = model.hidden(tokens_BL, None, segments_BL)
        return model.classify(model.pooled(x_BLD, segments_BL))[:, None]
    if rows.source_S is not None:
        source, segments = rows.source_S[None], rows.source_segments_S[None]
        return model(source, tokens_BL, segments, segments_BL)
    more = {} if rows.prefix_L is None else {"prefix_BL": rows.prefix_L[None]}
    return (model if predicts else model.hidden)(tokens_BL, None, segments_BL, **more)


@partial(jax.jit, static_argnums=(0, 3))
def _arrays(model: nn.Module, variables: Any, rows: _Rows, predicts: bool) -> dict[str, Any]:
    """Return the maps and norms of `Reading.arrays` for the first row, by path."""

    def run(model: Any) -> Any:
        return _call(model, rows, rows.tokens_RL[:1], rows.segments_RL[:1], predicts)

    _, captured = run_and_capture(model, variables, _CAPTURED, run)
    norm = partial(jnp.linalg.norm, axis=-1)
    found: dict[str, Any] = {}
    for path, x in captured.items():
        if path.endswith("attention"):
            found[path] = x[:, 0]
        elif path.endswith("residual"):
            found[path] = jnp.stack([norm(layer_BLW[0]) for layer_BLW in x])
        else:
            found[path] = norm(x[:, :, 0])
    return found


@partial(jax.jit, static_argnums=0)
def _predict(model: nn.Module, variables: Any, rows: _Rows) -> Predictions:
    """Return the predictions of all rows, [R, Q, …]."""
    config: Any = model.config  # type: ignore[attr-defined]

    def of_row(row: tuple[jax.Array, ...]) -> Predictions:
        tokens_L, segments_L, positions_Q, targets_Q = row

        def log_likelihoods(changes: list[jax.Array]) -> tuple[jax.Array, Any]:
            embedded: list[jax.Array] = []

            def add_change(method: Any, args: Any, kwargs: Any, context: Any) -> Any:
                result = method(*args, **kwargs)
                if context.method_name != "embed":
                    return result
                x_BLD, positions_BL = result  # an encoder–decoder embeds its source first
                embedded.append(x_BLD + changes[len(embedded)])
                return embedded[-1], positions_BL

            def run(model: Any) -> jax.Array:
                return _call(model, rows, tokens_L[None], segments_L[None])

            with nn.intercept_methods(add_change):
                logits_BLV, captured = run_and_capture(model, variables, ("residual",), run)
            logits_QV = logits_BLV[0, positions_Q]
            chosen_Q = jnp.where(targets_Q < 0, logits_QV.argmax(-1), targets_Q)
            residual = captured["decoder/residual" if len(changes) > 1 else "residual"]
            found_Q = _at(_log_probabilities(logits_QV, rows.multi_label), chosen_Q)
            seen = slice(None) if rows.is_class else positions_Q
            read_N = [x_BLW[0, seen] for x_BLW in residual]
            return found_Q, (logits_QV, chosen_Q, read_N, embedded)

        texts = [x for x in (rows.source_S, tokens_L) if x is not None]
        zeros = [jnp.zeros((1, len(x), config.d_model), config.dtype) for x in texts]
        log_likelihood_Q, vjp, aux = jax.vjp(log_likelihoods, zeros, has_aux=True)
        logits_QV, chosen_Q, residual_N, embedded = aux

        def attribute(one_hot_Q: jax.Array) -> list[jax.Array]:
            (gradients,) = vjp(one_hot_Q)
            pairs = zip(gradients, embedded, strict=True)
            return [(g[0] * x[0]).astype(jnp.float32).sum(-1) for g, x in pairs]

        one_hot_QQ = jnp.eye(len(positions_Q), dtype=log_likelihood_Q.dtype)
        *of_source, attribution = jax.lax.map(attribute, one_hot_QQ)
        widest = residual_N[-1].shape[-1]  # earlier layers lack what later ones append
        residual_NXW = jnp.stack(
            [jnp.pad(x, ((0, 0), (0, widest - x.shape[-1]))) for x in residual_N]
        )

        def end(model: Any) -> jax.Array:
            return _call(model, rows, jnp.zeros_like(tokens_L)[None], segments_L[None])

        def lens_of(x_XW: jax.Array) -> PredictionScores:
            with nn.intercept_methods(_replace_layers(x_XW)):
                logits_BQV: Any = nn.apply(end, model)(variables)
            return _score(logits_BQV[0], chosen_Q, N_LENS, rows.multi_label)

        lens = jax.lax.map(lens_of, residual_NXW)
        return Predictions(
            _score(logits_QV, chosen_Q, N_ALTERNATIVES, rows.multi_label),
            jax.tree.map(lambda x: x.swapaxes(0, 1), lens),
            attribution,
            of_source[0] if of_source else None,
        )

    parts = (rows.tokens_RL, rows.segments_RL, rows.positions_RQ, rows.targets_RQ)
    return jax.lax.map(of_row, parts)


def _replace_layers(x_XW: jax.Array) -> Callable[..., Any]:
    """Return an interceptor that replaces a model's layers by the state `x_XW`.

    Subsequent modules may read any number X of tokens: those with a prediction.
    """

    def replace_layers(method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if type(context.module) is not Stack or context.method_name != "_run":
            return method(*args, **kwargs)
        (x_BLW, caches), *_ = args
        is_encoder = context.module.name == "encoder"  # unused output, in an encoder–decoder
        return (x_BLW if is_encoder else x_XW[None].astype(x_BLW.dtype), caches), None

    return replace_layers


def _log_probabilities(logits_QV: jax.Array, multi_label: bool) -> jax.Array:
    return jax.nn.log_sigmoid(logits_QV) if multi_label else jax.nn.log_softmax(logits_QV)


def _score(
    logits_QV: jax.Array, chosen_Q: jax.Array, n: int, multi_label: bool
) -> PredictionScores:
    """Compute the scores of predictions.

    Args:
        logits_QV: logits.
        chosen_Q: target ids.
        n: number of alternatives.
        multi_label: whether each class has a probability of its own.
    """
    scores_QV = _log_probabilities(logits_QV, multi_label)
    entropy_QV = -jnp.exp(scores_QV) * scores_QV
    if multi_label:  # of each class
        entropy_QV += -jax.nn.sigmoid(-logits_QV) * jax.nn.log_sigmoid(-logits_QV)
    own_Q = _at(scores_QV, chosen_Q)
    best_QK, ids_QK = jax.lax.top_k(scores_QV, min(n, scores_QV.shape[-1]))
    return PredictionScores(
        loss=-own_Q,
        rank=1 + (scores_QV > own_Q[:, None]).sum(-1),
        entropy=entropy_QV.sum(-1),
        ids=ids_QK,
        probabilities=jnp.exp(best_QK),
    )


def _at(values_QV: jax.Array, ids_Q: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values_QV, ids_Q[:, None], axis=-1)[:, 0]
