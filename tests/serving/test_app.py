"""Any body gets a JSON answer; limits, metrics and pages of the server inside the process."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from lm.serving.app import POSTS

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


def test_what_is_no_json_object_is_named(client):
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
