"""Any request body gets a JSON answer; limits, metrics and pages of an in-process server."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from functools import partial

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from lm.decoding.engine.requests import EngineStatistics
from lm.serving import completion_api
from lm.serving.app import POSTS
from lm.serving.engine_thread import EngineThread

NAMES = [
    *("model", "prompt", "messages", "input", "tokens", "max_tokens", "n", "best_of", "seed"),
    *("temperature", "top_p", "top_k", "min_p", "stop", "stream", "stream_options", "logprobs"),
    *("top_logprobs", "echo", "logit_bias", "response_format", "presence_penalty", "tools"),
    *("repetition_penalty", "stop_token_ids", "ignore_eos", "encoding_format", "tool_choice"),
    *("min_tokens", "add_special_tokens", "other"),
]
TEXT = st.text(max_size=8)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "x"]), "content": VALUE}
)
LIKELY = {
    "model": st.just("tiny"),
    "prompt": TEXT | st.lists(st.integers(0, 300), max_size=4) | st.lists(TEXT, max_size=3),
    "messages": st.lists(MESSAGE, max_size=3),
    "input": TEXT | st.lists(TEXT, max_size=3),
    "tokens": st.lists(st.integers(0, 300), max_size=4),
    "response_format": st.fixed_dictionaries({"type": st.just("regex"), "regex": TEXT}),
    "stream": st.booleans(),
    "n": st.integers(0, 5),
    "logprobs": st.booleans() | st.integers(0, 3),
}
FIELD = st.sampled_from(NAMES).flatmap(
    lambda name: st.tuples(st.just(name), LIKELY.get(name, VALUE) | VALUE)
)
BODY = st.tuples(
    st.fixed_dictionaries({"max_tokens": st.just(2)}, optional=LIKELY),
    st.lists(FIELD, max_size=2).map(dict),
).map(lambda parts: parts[0] | parts[1])


def answer_of(response):
    """The JSON objects of a response."""
    if response.headers["content-type"].startswith("text/event-stream"):
        *events, last = [line[6:] for line in response.text.split("\n\n") if line]
        assert last == "[DONE]" or "error" in json.loads(last)
        return [json.loads(event) for event in events]
    return [response.json()]


@settings(max_examples=150)
@given(path=st.sampled_from(sorted(POSTS)), body=BODY)
def test_any_body_gets_a_json_answer(client, path, body):
    response = client.post(path, content=json.dumps(body))
    assert response.status_code in (200, 400, 404), response.text
    for answer in answer_of(response):
        if response.status_code != 200:
            assert set(answer["error"]) == {"message", "type", "param", "code"}


@settings(max_examples=60)
@given(path=st.sampled_from(sorted(POSTS)), body=st.binary(max_size=40) | VALUE.map(json.dumps))
def test_bytes_that_are_no_request_get_an_error(client, path, body):
    response = client.post(path, content=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["message"]


def test_non_object_json_is_reported(client):
    said = {
        b"": "empty",
        b"[1]": "list",
        b"\xff": "UTF-8",
        b'{"a": "\\ud800"}': "surrogate",
        b"[" * 5000: "deep",
    }
    for body, word in said.items():
        response = client.post("/v1/completions", content=body)
        assert (response.status_code, word in response.text) == (400, True), response.text
    assert client.post("/v1/completions", content=b" " * 20_000).status_code == 413
    assert client.get("/v1/completions").status_code == 405
    assert client.get("/nowhere").json()["error"]["type"] == "not_found_error"


def test_limits_of_tokens_and_replies(client):
    too_much = [{"max_tokens": 65}, {"n": 5}, {"prompt": [1] * 201}, {"prompt": ["a"] * 5}]
    for change in too_much:
        response = client.post("/v1/completions", json={"prompt": "a", **change})
        assert response.status_code == 400, response.text


def test_metrics_are_prometheus_text(client):
    before = metric(client, "lm_new_tokens_total")
    body = {"prompt": "the big", "max_tokens": 5, "ignore_eos": True}
    usage = client.post("/v1/completions", json=body).json()["usage"]
    assert usage["completion_tokens"] == 5
    assert metric(client, "lm_new_tokens_total") == before + 5
    assert metric(client, "lm_active_requests") == 0
    assert metric(client, "lm_requests_total", path="/v1/completions", status="200") >= 1
    assert metric(client, "lm_first_token_seconds_count") >= 1


def metric(client, name, **labels):
    families = text_string_to_metric_families(client.get("/metrics").text)
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def test_tokens_and_texts_are_inverse(client):
    ids = client.post("/tokenize", json={"prompt": "aé"}).json()["tokens"]
    assert ids[-3:] == list("aé".encode())
    assert client.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "aé"}
    chat = {"messages": [{"role": "user", "content": "aé"}]}
    assert client.post("/tokenize", json=chat).json()["count"] > len(ids)
    assert client.post("/detokenize", json={"tokens": [9999]}).status_code == 400


SMALL = {
    "/v1/completions": {"prompt": ["a", "b"], "n": 2, "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
    "/v1/embeddings": {"input": "a"},
    "/classify": {"model": "films", "input": "a"},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [65]},
}


def test_every_verb_enters_one_bounded_queue(client, monkeypatch):
    """Replies and groups of texts count; what is refused says when to ask again."""
    assert set(SMALL) == set(POSTS)
    counts = {path: 4 if path == "/v1/completions" else 1 for path in SMALL}
    for queue in client.server.queues.values():
        monkeypatch.setattr(queue, "size", 4)
    for path, body in SMALL.items():
        queue = client.server.queues[client.server.models[body.get("model", "tiny")]]
        assert client.post(path, json=body).status_code == 200
        assert queue.n == 0
        queue.n = 5 - counts[path]
        response = client.post(path, json=body)
        queue.n = 0
        assert (response.status_code, response.headers["Retry-After"]) == (429, "1"), path
    many = client.post("/v1/embeddings", json={"input": ["a"] * 129})
    assert (many.status_code, "5 replies or groups" in many.text) == (400, True), many.text


def test_texts_that_no_vector_or_class_is_of_are_rejected(client):
    """No text is cut in silence, and none without tokens has a vector."""
    for model in ("tiny", "lstm"):
        for texts in ("", ["a", ""], [], [[]], [[65], []]):
            response = client.post("/v1/embeddings", json={"model": model, "input": texts})
            assert response.status_code == 400, response.text
    for text, status in (("a" * 24, 200), ("a" * 25, 400), ("", 400)):  # four windows of 6 tokens
        response = client.post("/classify", json={"model": "films", "input": ["b", text]})
        assert response.status_code == status, response.text
        if len(text) > 24:
            assert response.json()["error"]["code"] == "context_length_exceeded"


def test_regression_has_no_class_probabilities(client, monkeypatch):
    model = client.server.models["films"]
    steps = model.experiment.steps
    steps = replace(steps, objective=replace(steps.objective, labels=()))
    monkeypatch.setattr(model, "experiment", replace(model.experiment, steps=steps))
    response = client.post("/classify", json={"model": "films", "input": "b"})
    assert (response.status_code, "not a classifier" in response.text) == (400, True)


def test_models_in_whole_batches_say_so_and_have_every_option(client):
    paged = {one["id"]: one["paged"] for one in client.get("/v1/models").json()["data"]}
    assert paged == {"tiny": True, "lstm": False, "films": None}
    ask = {"model": "lstm", "prompt": "ab", "max_tokens": 4, "logprobs": 2, "min_p": 0.1}
    ask |= {"logit_bias": {"120": 100}, "frequency_penalty": 1}
    (choice,) = client.post("/v1/completions", json=ask).json()["choices"]
    assert choice["text"] == "xxxx"
    assert len(choice["logprobs"]["token_logprobs"]) == 4
    grammar = {"type": "regex", "regex": "(yes|no)"}
    body = {"model": "lstm", "prompt": "ab", "response_format": grammar}
    for n, finish in ((9, "stop"), (1, "length")):
        (choice,) = client.post("/v1/completions", json=body | {"max_tokens": n}).json()["choices"]
        assert (choice["text"] in ("yes", "no"), choice["finish_reason"]) == (n == 9, finish)


def test_slow_grammar_is_rejected_without_blocking_others(client, monkeypatch):
    monkeypatch.setattr(completion_api, "_GRAMMAR_SECONDS", 0.05)
    done = threading.Event()
    monkeypatch.setattr(completion_api, "grammar_limits", lambda *args: done.wait(60))
    grammar = {"response_format": {"type": "regex", "regex": "a"}}
    response = client.post("/v1/completions", json={"prompt": "a", **grammar})
    assert (response.status_code, "grammar" in response.text) == (400, True), response.text
    assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
    assert not done.is_set()
    done.set()


class Failing:
    """Engine that fails at the first request; there is no other."""

    made = False
    context = 256

    def __init__(self, *args):
        if Failing.made:
            raise MemoryError
        Failing.made = True

    def add(self, request):
        return 0

    def step(self):
        raise ValueError

    def statistics(self):
        return EngineStatistics(*[4] * 8)


def test_engine_that_cannot_start_again_is_told(client, monkeypatch):
    model = client.server.models["tiny"]
    make = partial(EngineThread, Failing, model.prepared, model.params, "tiny", print)
    assert client.get("/healthz").status_code == 200
    failing = client.portal.call(make)
    monkeypatch.setattr(model, "engine", failing)
    for _ in range(2):
        response = client.post("/v1/completions", json={"prompt": "a"})
        assert response.status_code == 503, response.text
        assert response.json()["error"]["code"] == "engine_lost"
        assert response.headers["Retry-After"] == "1"
    assert client.get("/healthz").status_code == client.get("/readyz").status_code == 503
    failing.stop()


@pytest.mark.parametrize("before", [(), (0,), (65, 66)])
def test_echo_begins_with_the_prompt(client, monkeypatch, before):
    model = client.server.models["tiny"]
    template = replace(model.tokenizer.template, before=before)
    monkeypatch.setattr(type(model.tokenizer), "template", template)
    ask = {"max_tokens": 2, "echo": True, "logprobs": 1, "temperature": 0, "n": 2}
    ids = list(before) + model.tokenizer.encode("the big").tolist()
    answer = client.post("/v1/completions", json={**ask, "prompt": ["the big", "a"]}).json()
    assert answer["usage"]["prompt_tokens"] == len(ids) + len(before) + 1
    for choice, prompt in zip(answer["choices"], ["the big"] * 2 + ["a"] * 2, strict=True):
        logprobs = choice["logprobs"]
        assert choice["text"].startswith(prompt)
        assert "".join(logprobs["tokens"]) == choice["text"]
        assert (logprobs["token_logprobs"][0] is None) == (not before)
    of_ids = client.post("/v1/completions", json={**ask, "prompt": [ids]}).json()["choices"][0]
    of_text = answer["choices"][0]["logprobs"]["token_logprobs"]
    assert of_ids["text"] == model.tokenizer.decode(ids) + answer["choices"][0]["text"][7:]
    assert of_ids["logprobs"]["token_logprobs"][len(before) :] == of_text


@pytest.mark.parametrize("more", [{"max_tokens": 0, "echo": True}, {"max_tokens": 1}])
def test_ids_that_the_tokenizer_or_the_model_does_not_have(client, more):
    """An id of a padded vocabulary has no text; one beyond it, or too many, are errors."""

    def ask(model, ids):
        return client.post("/v1/completions", json={"model": model, "prompt": ids, **more})

    padded = ask("lstm", [97, 300])
    assert padded.status_code == 200, padded.text
    assert padded.json()["choices"][0]["text"].startswith("a" if "echo" in more else "")
    assert ask("lstm", [97, 320]).status_code == 400
    too_long = ask("tiny", [97] * 257)  # above the context, with which a program would be compiled
    assert too_long.status_code == 400
    assert too_long.json()["error"]["code"] == "context_length_exceeded"


def test_content_parts_are_joined(client):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "é"}]

    def tokens(content):
        ask = {"messages": [{"role": "user", "content": content}]}
        return client.post("/tokenize", json=ask).json()["tokens"]

    assert tokens(parts) == tokens("aé")
    ask = {"max_tokens": 2, "temperature": 0}
    whole, split = (
        client.post(
            "/v1/chat/completions", json={**ask, "messages": [{"role": "user", "content": x}]}
        ).json()["choices"]
        for x in ("aé", parts)
    )
    assert split == whole
    for part in ({"type": "image_url", "image_url": {"url": "x"}}, {"type": "text"}, "a", 3):
        body = {"messages": [{"role": "user", "content": [part]}]}
        answer = client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400
        assert "must be text" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "wrong", [{"stop": 0}, {"stop": False}, {"stop_token_ids": False}, {"stop_token_ids": 0}]
)
def test_false_instead_of_a_list_means_none(client, wrong):
    answer = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, **wrong})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == next(iter(wrong))


def test_request_has_one_checkpoint(client, monkeypatch):
    """A newer one that comes while the prompt is scored is that of the whole reply."""
    model = client.server.models["tiny"]
    old, new = model.params, jax.tree.map(lambda x: x * 0.5, model.params)
    ask = {"prompt": "the", "max_tokens": 2, "echo": True, "logprobs": 0, "temperature": 0}
    scored = []

    def prompt_logprobs(experiment, params, *args):
        if not scored:
            model.engine.update(new)
            model.params, model.step = new, 9
        scored.append(params)
        return scores(experiment, params, *args)

    scores = completion_api.prompt_logprobs
    monkeypatch.setattr(completion_api, "prompt_logprobs", prompt_logprobs)
    monkeypatch.setattr(model, "step", model.step)
    found = client.post("/v1/completions", json=ask).json()
    assert found["choices"] == client.post("/v1/completions", json=ask).json()["choices"]
    assert found["system_fingerprint"] == "step-9"
    assert scored[0] is old
    assert all(one is new for one in scored[1:])
    model.engine.update(old)
    model.params = old
