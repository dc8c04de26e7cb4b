"""Text endpoints other than generation: embeddings, classify, tokenize, detokenize.

Shape letters: B texts, L length, D model.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from math import ceil
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lm.data.records import BadRow
from lm.data.special_tokens import special_tokens
from lm.decoding.chats import chat_of
from lm.decoding.engine.adapters import Adapters
from lm.decoding.prompts import check_ids, context_length, pad_ids, padded_length
from lm.models.variables import Params, as_variables
from lm.parallel.mesh import use_mesh
from lm.runs.text_classifier import TextClassifier
from lm.serving.completion_api import Exchange
from lm.serving.request_body import ApiError, Body, is_ids, with_plain_texts, wrong
from lm.serving.sampling_parameters import RequestLimits
from lm.serving.served_models import ServedModel

Json = dict[str, Any]
_MOST_TEXTS = 2048  # per request, as in OpenAI's API
_GROUP = 32  # texts per batch
_WINDOWS = 4  # windows per classified text


async def embed(exchange: Exchange, body: Body, limits: RequestLimits) -> Json:
    """Handle `/v1/embeddings`: the normalized mean of the last hidden states of each text.

    Raises:
        ApiError: a parameter is invalid.
    """
    model = _model(exchange)
    given, form = body.raw("input"), body.text("encoding_format", "float")
    body.finish(("dimensions",))
    if model.has_source:
        raise ApiError(400, f"the model {exchange.name} does not support embeddings", "model")
    if form not in ("float", "base64"):
        raise wrong("encoding_format", "it must be float or base64")
    texts = _texts(given)
    exchange.reserve(ceil(len(texts) / _GROUP))
    ids = await model.in_worker(_inputs, model, texts, limits)
    exchange.usage.prompt_tokens = sum(map(len, ids))
    number = model.adapter_number(exchange.name)
    vectors_BD = await model.in_worker(_vectors, model, model.params, ids, number)
    data = [
        {"object": "embedding", "index": i, "embedding": _written(vector_D, form)}
        for i, vector_D in enumerate(vectors_BD)
    ]
    usage = exchange.usage.as_json()
    return {"object": "list", "data": data, "model": exchange.name, "usage": usage}


async def classify(exchange: Exchange, body: Body, limits: RequestLimits) -> Json:
    """Handle `/classify`: the class probabilities of each text.

    Raises:
        ApiError: a parameter is invalid.
    """
    model = _model(exchange)
    texts = body.texts("input", _MOST_TEXTS)
    body.finish()
    if model.kind != "classify" or not model.experiment.objective.class_names:
        raise ApiError(400, f"the model {exchange.name} is not a classifier", "model")
    if not texts:
        raise wrong("input", "it must be a text or a list of texts")
    exchange.reserve(ceil(len(texts) / _GROUP))
    exchange.texts["input"] = texts
    classifier = TextClassifier(model.experiment, model.params, model.tokenizer)
    most = min(limits.prompt_tokens, classifier.window * _WINDOWS)
    lengths = await model.in_worker(_lengths, model, texts, most)
    exchange.usage.prompt_tokens = sum(lengths)
    columns = range(len(classifier.labels))
    _, probabilities_BC = await model.in_worker(classifier.largest, texts, columns, _WINDOWS)
    data = [
        {
            "index": i,
            "label": classifier.labels[int(row.argmax())],
            "probs": [float(x) for x in row],
            "num_classes": len(row),
        }
        for i, row in enumerate(probabilities_BC)
    ]
    labels = list(classifier.labels)
    return {"object": "list", "model": exchange.name, "labels": labels, "data": data}


async def tokenize(exchange: Exchange, body: Body, limits: RequestLimits) -> Json:
    """Handle `/tokenize`: the ids of a prompt or of messages, as used by completions and chats.

    Raises:
        ApiError: a parameter is invalid.
        UserError: the chat template rejects the messages.
    """
    model = _model(exchange)
    messages = body.raw("messages")
    text = body.text("prompt", "" if messages is not None else None)
    with_special = body.raw("add_special_tokens")
    with_texts = body.flag("return_token_strs")
    body.finish()
    if not isinstance(with_special, bool | None):
        raise wrong("add_special_tokens", "it must be true or false")
    exchange.reserve(1)
    if messages is not None:
        if model.template is None:
            raise ApiError(400, f"the model {exchange.name} has no chat template", "model")
        try:
            conversation = chat_of({"messages": with_plain_texts(messages)})
        except BadRow as error:
            raise wrong("messages", str(error)) from None
        ids = await model.in_worker(model.chat_ids, conversation)
    elif with_special is False:
        ids = (await model.in_worker(model.tokenizer.encode, text)).tolist()
    else:
        ids = await model.in_worker(model.prompt_ids, text)
    found = {"count": len(ids), "max_model_len": _context(model), "tokens": ids}
    return found | ({"token_strs": [model.pieces[i] for i in ids]} if with_texts else {})


async def detokenize(exchange: Exchange, body: Body, limits: RequestLimits) -> Json:
    """Handle `/detokenize`: the text of token ids.

    Raises:
        ApiError: a parameter is invalid.
    """
    model = _model(exchange)
    if not body.has("tokens"):
        raise wrong("tokens", "it must be a list of token ids")
    ids = body.ids("tokens", 2**20)
    body.finish()
    if any(i >= model.tokenizer.vocab_size for i in ids):
        raise wrong(
            "tokens", f"an id is not below the vocabulary size {model.tokenizer.vocab_size}"
        )
    exchange.reserve(1)
    return {"prompt": await model.in_worker(model.tokenizer.decode, ids)}


def about_tokenizer(model: ServedModel) -> Json:
    """Return the answer of `/tokenizer_info`, which lm-eval requests before `/tokenize`.

    Its tokens are those that `/tokenize` parses in text.
    """
    tokenizer = model.tokenizer

    def name(token: int | None) -> str | None:
        found = None if token is None else model.pieces[token]
        return found if found and tokenizer.encode(found).tolist() == [token] else None

    return {
        "tokenizer_class": tokenizer.kind,
        "bos_token": name(tokenizer.bos_id),
        "eos_token": name(tokenizer.eos_id),
        "chat_template": model.template.source if model.template else None,
    }


def _model(exchange: Exchange) -> ServedModel:
    assert exchange.model is not None
    return exchange.model


def _context(model: ServedModel) -> int | None:
    if model.engine is not None:
        return model.engine.context
    return int(model.experiment.config.model.max_length)


def _texts(given: Any) -> list[str | list[int]]:
    """Parse the texts of a body: a text, token ids, or a list of either."""
    texts = [given] if isinstance(given, str) or is_ids(given) else given
    if not isinstance(texts, list) or len(texts) > _MOST_TEXTS:
        raise wrong(
            "input", f"it must be a text, token ids, or a list of at most {_MOST_TEXTS} of them"
        )
    if not texts or not all(text and (isinstance(text, str) or is_ids(text)) for text in texts):
        raise wrong("input", "texts or lists of token ids, none of them empty")
    return texts


def _inputs(
    model: ServedModel, texts: Sequence[str | list[int]], limits: RequestLimits
) -> list[list[int]]:
    """Return the ids of texts as encoder inputs."""
    special = special_tokens(model.tokenizer)
    most = min(limits.prompt_tokens, _context(model) or 2**31)
    is_encoder = model.experiment.config.model.family == "encoder"

    def read(text: str | list[int]) -> list[int]:
        if not isinstance(text, str):
            return text
        if is_encoder:
            return [special.cls, *model.tokenizer.encode(text).tolist(), special.sep]
        return model.prompt_ids(text)

    found = [read(text) for text in texts]
    _check_lengths(list(map(len, found)), most)
    check_ids(found, model.experiment.model)
    return found


def _lengths(model: ServedModel, texts: Sequence[str], most: int) -> list[int]:
    """Return token counts of texts; ApiError for an empty one or one with more than `most`."""
    found = [len(model.tokenizer.encode(text)) for text in texts]
    _check_lengths(found, most)
    return found


def _check_lengths(lengths: Sequence[int], most: int) -> None:
    for n in lengths:
        if not n:
            raise wrong("input", "a text has no tokens")
        if n > most:
            problem = f"input: a text has {n} tokens; the maximum is {most}"
            raise ApiError(400, problem, "input", "context_length_exceeded")


def _vectors(
    model: ServedModel, params: Params, ids: Sequence[Sequence[int]], adapter: int
) -> np.ndarray:
    """Return a unit vector for each text, float32 [B, D]."""
    context = context_length(model.experiment.model)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    found: dict[int, np.ndarray] = {}
    for start in range(0, len(order), _GROUP):
        numbers = order[start : start + _GROUP]
        rows = [ids[i] for i in numbers]
        n_rows = 1 << (len(rows) - 1).bit_length()
        width = padded_length(max(map(len, rows)))
        filled = [*rows, *[rows[-1]] * (n_rows - len(rows))]
        arrays = pad_ids(filled, min(width, context or width), left=False)
        experiment = model.prepared
        adapted = model.adapters, np.full(n_rows, adapter)
        with use_mesh(experiment.mesh, experiment.config.parallel.sequence, experiment.pipeline):
            vectors_BD = np.asarray(_mean_states(experiment.model, params, *arrays, *adapted))
        found |= zip(numbers, vectors_BD, strict=False)
    return np.stack([found[i] for i in range(len(ids))])


@partial(jax.jit, static_argnums=0)
def _mean_states(
    model: nn.Module,
    params: Params,
    tokens_BL: jax.Array,
    segments_BL: jax.Array,
    adapters: Adapters | None,
    adapters_B: jax.Array,
) -> jax.Array:
    """Return the normalized mean of the last hidden states of each text."""
    variables = as_variables(params)
    with nn.intercept_methods(adapters.interceptor(adapters_B)) if adapters else nullcontext():
        x_BLD: Any = model.apply(variables, tokens_BL, None, segments_BL, method="hidden")
    sums_BD = (x_BLD.astype(jnp.float32) * segments_BL[..., None]).sum(1)
    return sums_BD / jnp.maximum(jnp.linalg.norm(sums_BD, axis=-1, keepdims=True), 1e-12)


def _written(vector_D: np.ndarray, form: str) -> list[float] | str:
    if form == "float":
        return vector_D.tolist()
    return base64.b64encode(vector_D.astype("<f4").tobytes()).decode()
