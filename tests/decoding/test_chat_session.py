import json

import pytest

from lm.api import load_run
from lm.data.chat.chat_template import ChatTemplate
from lm.decoding import chat_session, generation
from lm.decoding.chat_session import ChatSession
from lm.decoding.chats import Chat, chat_controls, chat_ids, chat_of, stop_texts
from lm.decoding.sampling import Sampling
from lm.errors import UserError


@pytest.fixture(scope="module")
def run(tiny_run):
    return load_run(tiny_run)


@pytest.fixture
def session(run, monkeypatch):
    """Return a session whose model repeats the last message and the seed, in two parts."""

    def answer(experiment, params, tokenizer, chats, sampling, seed, stop, template):
        session.shown = [message["content"] for message in chats[0].messages]
        yield [f"to {session.shown[-1]}"]
        yield [f" {seed}"]

    monkeypatch.setattr(chat_session, "stream_continuations", answer)
    template = ChatTemplate.of(run.tokenizer)
    session = ChatSession(run.experiment, run.params, template, Sampling(), seed=5)
    return session


def said(session):
    return [message["content"] for message in session.messages]


def test_answers_are_kept_and_can_be_undone(session):
    assert list(session.say("a")) == ["to a", " 5"]
    assert list(session.say("b")) == ["to b", " 6"]
    assert session.shown == ["a", "to a 5", "b"]
    assert "".join(session.answer_again()) == "to b 7"
    assert said(session) == ["a", "to a 5", "b", "to b 7"]
    session.take_back()
    assert said(session) == ["a", "to a 5"]
    session.restart()
    for action in (session.take_back, session.answer_again):
        with pytest.raises(UserError, match=r"nothing to undo|no question"):
            action()


def test_interrupted_answer_is_kept_as_far_as_it_is(session):
    parts = session.say("a")
    next(parts)
    parts.close()
    assert said(session) == ["a", "to a"]


def test_whole_oldest_turns_are_forgotten_and_the_system_prompt_is_not(session):
    session.system = "S"
    longest = session.experiment.config.data.sequence_length
    length = len(chat_ids(session.template, Chat([{"role": "user", "content": "x" * 60}])))
    for _ in range(4):
        list(session.say("x" * 60))
    assert session.n_forgotten == 3  # 256 tokens, of which a turn has more than half
    assert session.shown == ["S", "x" * 60]
    assert len(session.messages) == 8
    assert length < longest
    with pytest.raises(UserError, match=f"tokens; the context holds {longest}"):
        session.say("x" * 300)
    assert len(session.messages) == 8
    session.restart()
    assert list(session.say("a")) == ["to a", " 9"]
    assert session.n_forgotten == 0


def test_saved_conversation_is_loaded(session, tmp_path):
    session.system = "S"
    list(session.say("é\n"))
    file = tmp_path / "chat.jsonl"
    session.save(file)
    before = said(session)
    assert json.loads(file.read_text())["messages"][0] == {"role": "system", "content": "S"}
    session.system, _ = "", session.restart()
    assert session.load(file) == 1
    assert (session.system, said(session)) == ("S", before)
    tools = [{"type": "function", "function": {"name": "now"}}]
    row = json.dumps({"messages": [{"role": "user", "content": "a"}], "tools": tools}) + "\n"
    other = tmp_path / "tools.jsonl"
    other.write_text(row + row)
    assert session.load(other) == 2
    session.save(other)
    assert other.read_text() == row
    session.load(file)
    for place in (tmp_path, tmp_path / "no" / "where"):
        with pytest.raises(UserError, match=str(place)):
            session.save(place)
    for text, problem in (("", "no conversation"), ('{"a": 1}\n', "no field 'messages'")):
        file.write_text(text)
        with pytest.raises(UserError, match=problem):
            session.load(file)
    assert said(session) == before
    with pytest.raises(UserError, match="no file"):
        session.load(tmp_path / "none.jsonl")


def test_words_that_mark_turns_end_an_answer(run, monkeypatch):
    """The byte tokenizer has no token for it, so the name of the token is looked for."""
    template = ChatTemplate.of(run.tokenizer)
    assert not template.has_role_tokens
    assert stop_texts(template) == ("<|im_end|>",)
    assert set(chat_controls(run.config, run.tokenizer, template).end_ids) >= {run.tokenizer.eos_id}
    seen = {}

    def fake_steps(model, params, ids, *parts, **options):
        seen["prompt"] = run.tokenizer.decode(ids[0])
        yield from ([byte] for byte in b"yes<|im_end|>\n<|im_start|>")

    monkeypatch.setattr(generation, "sample_steps", fake_steps)
    session = ChatSession(run.experiment, run.params, template, Sampling())
    assert "".join(session.say("ok?")) == "yes"
    assert seen["prompt"] == "<|im_start|>user\nok?<|im_end|>\n<|im_start|>assistant\n"


def test_answer_that_is_begun_is_continued(run):
    template = ChatTemplate.of(run.tokenizer)
    chat = chat_of({"prompt": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]})
    assert run.tokenizer.decode(chat_ids(template, chat)) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb"
    )
    with_system = chat_of({"messages": [{"role": "user", "content": "a"}]}, system="S")
    assert [m["role"] for m in with_system.messages] == ["system", "user"]


def test_from_python(run):
    options = {"temperature": 0, "max_new_tokens": 4}
    answer = run.chat("hello", **options)
    assert run.chat([{"role": "user", "content": "hello"}], **options) == answer
    assert isinstance(answer, str)
    for messages in ([], [{"role": "nobody", "content": ""}], [{"content": "x"}], 3):
        with pytest.raises(UserError):
            run.chat(messages)
