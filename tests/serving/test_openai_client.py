"""OpenAI's client with a server in another process, with and without streaming."""

from __future__ import annotations

import json

import openai
import pytest


@pytest.fixture(scope="module")
def api(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def streamed(chunks):
    """Texts by choice, finish reasons, and the usage of a stream."""
    texts, finishes, usage = {}, {}, None
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text = choice.delta.content if hasattr(choice, "delta") else choice.text
            texts[choice.index] = texts.get(choice.index, "") + (text or "")
            finishes[choice.index] = choice.finish_reason or finishes.get(choice.index)
    return texts, finishes, usage


def test_streamed_text_equals_the_whole_reply(api):
    asked = {"model": "tiny", "prompt": ["the big", "a model"], "n": 2, "seed": 5, "max_tokens": 12}
    whole = api.completions.create(**asked)
    options = {"include_usage": True}
    texts, finishes, usage = streamed(
        api.completions.create(**asked, stream=True, stream_options=options)
    )
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert finishes == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage == whole.usage
    assert texts[0] != texts[1]
    alone = api.completions.create(**asked | {"prompt": "a model"})
    assert [choice.text for choice in alone.choices] == [texts[2], texts[3]]
    assert whole.usage.prompt_tokens == sum(map(len, asked["prompt"])) + 2  # bos


def test_chat_streams_its_answer(api):
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "seed": 3}
    asked |= {"max_completion_tokens": 10}
    whole = api.chat.completions.create(**asked).choices[0]
    texts, finishes, _ = streamed(api.chat.completions.create(**asked, stream=True))
    assert whole.message.role == "assistant"
    assert texts == {0: whole.message.content}
    assert finishes == {0: whole.finish_reason}


def test_logit_bias_stop_and_top_k_decide_the_text(api):
    ids = {str(ord(letter)): 100 for letter in "xy"}
    asked = {"model": "tiny", "prompt": "the", "logit_bias": ids, "max_tokens": 20, "seed": 1}
    text = api.completions.create(**asked).choices[0].text
    assert set(text) == {"x", "y"}
    stopped = api.completions.create(**asked, stop=["yx", text[3:6]]).choices[0]
    assert stopped.finish_reason == "stop"
    assert text.startswith(stopped.text)
    assert "yx" not in stopped.text
    greedy = [
        api.completions.create(**asked, **options).choices[0].text
        for options in ({"temperature": 0}, {"extra_body": {"top_k": 1}})
    ]
    assert greedy[0] == greedy[1]


def test_logprobs_of_an_echo_match_the_reply(api):
    reply = api.completions.create(
        model="tiny", prompt="the big", max_tokens=4, temperature=0, logprobs=3
    ).choices[0]
    ids = json.loads(
        api.post("/../tokenize", body={"model": "tiny", "prompt": "the big"}, cast_to=str)
    )["tokens"]
    logged = reply.logprobs
    assert [max(top.values()) for top in logged.top_logprobs] == pytest.approx(
        logged.token_logprobs, abs=1e-5
    )
    echo = api.completions.create(
        model="tiny", prompt=[ids], max_tokens=1, temperature=0, logprobs=3, echo=True
    ).choices[0]
    assert echo.text.startswith("the big")
    assert echo.logprobs.token_logprobs[0] is None
    assert len(echo.logprobs.tokens) == len(ids) + 1
    assert echo.logprobs.token_logprobs[-1] == pytest.approx(logged.token_logprobs[0], abs=1e-4)


def test_schema_bounds_the_answer(api):
    schema = {"type": "object", "properties": {"a": {"enum": [True, False]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    answer = api.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=30,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    ).choices[0]
    assert json.loads(answer.message.content)["a"] in (True, False)
    assert answer.finish_reason == "stop"


def test_errors_are_the_clients_exceptions(api):
    with pytest.raises(openai.NotFoundError, match="did you mean tiny"):
        api.completions.create(model="tin", prompt="a")
    with pytest.raises(openai.BadRequestError, match="temperature") as raised:
        api.completions.create(model="tiny", prompt="a", temperature=-1)
    assert raised.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="does not support"):
        api.completions.create(model="tiny", prompt="a", suffix="b")
    with pytest.raises(openai.BadRequestError, match="the maximum is 255"):
        api.completions.create(model="tiny", prompt="a" * 300)


def test_embeddings_have_length_one(api):
    texts = ["the big model", "a small token", "the big model"]
    found = [one.embedding for one in api.embeddings.create(model="tiny", input=texts).data]
    assert found[0] == pytest.approx(found[2], abs=1e-6)
    assert found[0] != pytest.approx(found[1], abs=1e-3)
    assert sum(x * x for x in found[0]) == pytest.approx(1, abs=1e-5)
    plain = api.embeddings.create(model="tiny", input=texts[0], encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(found[0], abs=1e-6)
