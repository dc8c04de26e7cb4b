import functools

import jax
import numpy as np
import pytest

from lm.data.tokenizers.basic import ByteTokenizer
from lm.data.tokenizers.hf import HuggingFaceTokenizer
from lm.decoding import generation
from lm.decoding.generated import Generation, generation_record
from lm.decoding.generation import generate_texts, stream_continuations
from lm.decoding.prompts import source_ids
from lm.decoding.sampling import Sampling


def continuations(
    monkeypatch,
    experiment,
    prompts,
    rows,
    stop=(),
    tokenizer=ByteTokenizer(),  # noqa: B008
):
    """What stream_continuations gives when the model generates these rows of bytes."""
    seen = {}

    def fake_steps(model, params, ids, max_new_tokens, sampling, seed, controls, **options):
        seen["ids"], seen["end_ids"] = [list(row) for row in ids], controls.end_ids
        yield from np.array(rows).T

    monkeypatch.setattr(generation, "sample_steps", fake_steps)
    monkeypatch.setattr(generation, "prepare", lambda *parts: parts)
    steps = stream_continuations(experiment, None, tokenizer, prompts, Sampling(), 0, stop)
    return [list(parts) for parts in zip(*steps, strict=True)], seen


@pytest.fixture
def experiment(make_experiment):
    return make_experiment("decoder")[0]


def test_prompts_start_like_documents(monkeypatch, experiment):
    _, seen = continuations(monkeypatch, experiment, ["ab", ""], [[1], [2]])
    assert seen["ids"] == [[256, 97, 98], [256]]
    assert seen["end_ids"] == (256,)


def test_character_appears_when_its_bytes_are_complete(monkeypatch, experiment):
    euro = list("€".encode())
    parts, _ = continuations(monkeypatch, experiment, ["x"], [[*euro, 33]])
    assert parts == [["", "", "€", "!"]]


def test_byte_run_is_held_back_if_decoded_as_a_whole(monkeypatch, experiment):
    """The decoder of Llama: "é" and a byte that is no UTF-8 become three U+FFFD together."""
    tokenizers = pytest.importorskip("tokenizers")
    ids = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"a": 256, "b": 257}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(ids, [], byte_fallback=True))
    decoders = tokenizers.decoders
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = HuggingFaceTokenizer(made.to_str().encode())
    rows = [[0xC3, 0xA9, 0xFF, 256, 0xC3, 0xA9], [257, 0xC3, 0xA9, 257, 0xC3, -1]]
    parts, _ = continuations(monkeypatch, experiment, ["a", "a"], rows, (), tokenizer)
    assert parts[0] == ["", "", "", "\ufffd\ufffd\ufffda", "", "", "é"]
    assert parts[1] == ["b", "", "", "éb", "", "", ""]


def test_ended_rows_grow_no_more(monkeypatch, experiment):
    rows = [[97, -1, -1], [98, 99, 100]]
    parts, _ = continuations(monkeypatch, experiment, ["x", "y"], rows)
    assert parts == [["a", "", ""], ["b", "c", "d"]]


@pytest.mark.parametrize(
    ("text", "stop", "parts"),
    [
        ("abcde", ["cd"], ["a", "b", "", ""]),
        ("abxc", ["bc"], ["a", "", "bx", "c"]),
        ("aab", ["ab"], ["", "a", ""]),
        ("ab", ["bc"], ["a", "", "b"]),
        ("abc", ["c", "bcd", "b"], ["a", ""]),
        ("xab", ["x"], [""]),
    ],
)
def test_possible_stop_texts_are_held_back(monkeypatch, experiment, text, stop, parts):
    found, _ = continuations(monkeypatch, experiment, ["x"], [list(text.encode())], stop)
    assert found == [parts]


def test_rows_stop_on_their_own(monkeypatch, experiment):
    rows = [list(b"abcd"), list(b"bcda")]
    found, _ = continuations(monkeypatch, experiment, ["", "x"], rows, ["b"])
    assert found == [["a", ""], ["", ""]]  # both have ended: no further steps


def test_ids_beyond_the_vocabulary_are_no_text(monkeypatch, experiment):
    parts, _ = continuations(monkeypatch, experiment, ["x"], [[97, 300, 98]])
    assert parts == [["a", "", "b"]]


@pytest.mark.parametrize("family", ["encoder_decoder", "decoder"])
def test_greedy_search_and_greedy_sampling_write_what_the_full_pass_says(make_experiment, family):
    made = make_experiment(family)
    prompts = ["abc", "", "eeda"]
    (best,) = zip(*generate_texts(*made, prompts, None, 0), strict=True)
    for prompt, written in zip(prompts, best, strict=True):
        assert written.text == greedily(*made, prompt)
    if family == "decoder":
        (found,) = zip(*generate_texts(*made, prompts, Sampling(0.0), 0), strict=True)
        assert [w.text for w in found] == [w.text for w in best]
        steps = stream_continuations(*made, prompts, Sampling(0.0), 0)
        assert ["".join(parts) for parts in zip(*steps, strict=True)] == [w.text for w in best]


def greedily(experiment, params, tokenizer, prompt):
    """What the most likely tokens make, by a full pass for each; rows are filled up behind."""
    apply = _apply(experiment.model)
    letters = [*tokenizer.encode(prompt)]
    target = []
    for _ in range(experiment.config.decode.max_length):
        if experiment.config.model.family == "decoder":
            before = [1, *letters, *target]
            logits = apply(params, filled(before))
        else:
            before, source = [1, *target], [*letters, 2]
            segments = filled([1] * len(source)), filled([1] * len(before))
            logits = apply(params, filled(source), filled(before), *segments)
        chosen = int(logits[0, len(before) - 1].argmax())
        if chosen == 2:
            break
        target.append(chosen)
    return tokenizer.decode(target)


def filled(row):
    return np.array([[*row, *[0] * (12 - len(row))]])


@functools.cache
def _apply(model):
    return jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs))


def test_sources_end_and_are_cut_like_in_training():
    assert source_ids(ByteTokenizer(), "abc", 9) == [97, 98, 99, 256]
    assert source_ids(ByteTokenizer(), "abc", 3) == [97, 98, 256]


def test_records():
    two = [Generation("b", -0.5), Generation("c", -0.7)]
    best = {"source": "a", "text": "b", "score": -0.5}
    assert generation_record("source", "a", two, 1) == best
    others = [{"text": "b", "score": -0.5}, {"text": "c", "score": -0.7}]
    assert generation_record("source", "a", two, 3) == {**best, "hypotheses": others}
    sampled = [Generation("b", None)]
    assert generation_record("prompt", "a", sampled, 1) == {"prompt": "a", "text": "b"}
    assert generation_record("source", "a", [], 2) == {"source": "a", "text": "", "hypotheses": []}
