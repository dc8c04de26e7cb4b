"""Length limits of generated texts, in sampling and beam search."""

import io
import json
import re

import jax
import numpy as np
import pytest
import sentencepiece

from lm.config import default
from lm.data.tokenizers.basic import ByteTokenizer, CharTokenizer, WordTokenizer
from lm.data.tokenizers.sentencepiece import SentencePieceTokenizer
from lm.decoding import text_limits as text_limits_module
from lm.decoding.controls import Controls
from lm.decoding.text_limits import text_limits, token_bytes, with_grammar
from lm.errors import UserError

pytest.importorskip("llguidance")
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["yes", "no"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def limits_of(tokenizer=None, end_ids=(256,), **keys):
    decode = default().decode
    for name, value in keys.items():
        decode[name] = value
    return text_limits(decode, tokenizer or ByteTokenizer(), end_ids)


def write(limits, seed, n=40):
    """Random text within limits, as bytes; None if it has not ended."""
    draw, ids = np.random.default_rng(seed), []
    scores_V = np.random.default_rng(9).normal(size=257)
    for i in range(n):
        written = np.full((1, n), -1)
        written[0, :i] = ids
        (allowed,) = limits.allowed(257, written, i)
        ids.append(int(np.argmax(np.where(allowed, scores_V + draw.gumbel(size=257), -np.inf))))
        if ids[-1] == 256:
            return bytes(ids[:-1])
    return None


def test_outputs_of_a_json_schema_are_valid_json(tmp_path):
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    limits = limits_of(grammar=f"json:{tmp_path}/schema.json")
    found = [text for seed in range(20) if (text := write(limits, seed, 60)) is not None]
    assert len(found) > 5
    for text in found:
        values = json.loads(text)
        assert values.keys() == {"a", "b"}
        assert type(values["a"]) is int
        assert values["b"] in ("yes", "no")


def test_banned_pattern_never_occurs_and_only_allowed_words_do():
    limits = limits_of(banned_pattern=r"[a-m]{2}|/x", allowed="al, net, I'm")
    for seed in range(10):
        text = (write(limits, seed) or b"").decode()
        assert not re.search(r"[a-m]{2}|/x", text)
    limits = limits_of(allowed="cat,I'm")
    texts = [write(limits, seed, 12) for seed in range(30)]
    for text in filter(None, texts):
        words = re.findall(r"I'm|\w+", text.decode(), re.IGNORECASE)
        assert {word.lower() for word in words} <= {"cat", "i'm"}


def test_words_of_scripts_without_spaces_may_follow_one_another():
    limits = limits_of(allowed="猫,喜欢,cat")
    for text, fits in (("猫喜欢cat猫, cat cat", True), ("猫喜", False), ("catcat", False)):
        ids = [*text.encode(), 256]
        written = np.full((1, len(ids)), -1)
        steps = []
        for i, token in enumerate(ids):
            steps.append(limits.allowed(257, written, i)[0, token])
            written[0, i] = token
        assert all(steps) == fits


def test_bytes_of_tokens():
    assert token_bytes(ByteTokenizer())[200:] == [*(bytes([i]) for i in range(200, 256)), None]
    assert token_bytes(CharTokenizer("aé猫")) == [b"a", "é".encode(), "猫".encode()]
    words = WordTokenizer(("<unk>", "<eos>", "the", "cat"), (1, 1, 1, 1))
    found = dict(zip(words.pieces(), token_bytes(words), strict=True))
    assert found["cat"] == b" cat"
    assert found["<unk>"] is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"banned_pattern": "a("}, "unclosed group"),
        ({"banned_pattern": r"\bword"}, "lookarounds"),
        ({"allowed": ","}, "no word"),
        ({"grammar": "json"}, "write json:FILE"),
        ({"grammar": "yaml:x"}, "write json:FILE"),
        ({"grammar": "json:none.json"}, "no file none.json"),
        ({"grammar": "lark:none.lark"}, "no file none.lark"),
        ({"grammar": "regex:[a"}, "unclosed"),
    ],
)
def test_invalid_limit_is_a_one_line_error(keys, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        limits_of(**keys)
    assert "\n" not in str(caught.value)


def test_grammar_of_a_request_is_compiled_when_it_is_read(monkeypatch):
    """The thread that generates replies does not wait for it."""
    limits = with_grammar(None, "regex", "ab", ByteTokenizer(), (256,))
    monkeypatch.setattr(text_limits_module, "_matcher", None)
    (allowed,) = limits.allowed(257, np.full((1, 4), -1), 0)
    assert np.flatnonzero(allowed).tolist() == [ord("a")]


@pytest.mark.parametrize(
    ("kind", "source", "text"),
    [
        ("json", '{"const": "a b"}', b'"a b"'),
        ("regex", "é{2}( b)?", "éé b".encode()),
        ("regex", " a", b" a"),
        ("lark", 'start: "b" | " b a"', b" b a"),
    ],
)
def test_required_text_is_spelled_without_the_tokenizers_prefix(kind, source, text):
    """Llama's SentencePiece begins every text with a space, and lets no byte stand for one."""
    model = io.BytesIO()
    options = {"vocab_size": 270, "byte_fallback": True, "model_type": "bpe", "minloglevel": 3}
    options |= {"sentence_iterator": iter(["a b ba ab bb aa"] * 9), "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(model_writer=model, **options)
    tokenizer = SentencePieceTokenizer(model.getvalue())
    end, spelt = tokenizer.stop_ids[0], token_bytes(tokenizer)
    limits = with_grammar(None, kind, source, tokenizer, (end,))
    ids = []
    while end not in ids:
        (allowed,) = limits.allowed(tokenizer.vocab_size, np.array([ids], int), len(ids))
        rest = text[len(b"".join(spelt[i] for i in ids)) :]
        fits = [i for i in np.flatnonzero(allowed) if i != end and rest.startswith(spelt[i])]
        assert fits or (not rest and allowed[end])
        ids.append(max(fits, key=lambda i: len(spelt[i])) if fits else end)
    assert b"".join(spelt[i] for i in ids[:-1]) == text


def test_damaged_files_of_grammars_are_one_line_errors(tmp_path):
    file = tmp_path / "bad"
    for kind, content in (("json", '{"type'), ("json", '{"type": "objekt"}'), ("lark", "start: x")):
        file.write_text(content)
        with pytest.raises(UserError):
            limits_of(grammar=f"{kind}:{file}")
    with pytest.raises(UserError, match="no end token"):
        limits_of(CharTokenizer("ab"), (), grammar="regex:a")


def test_row_without_allowed_tokens_ends_in_compiled_code():
    controls = Controls((256,), limits=limits_of(grammar="regex:ab"))
    written = np.full((3, 4), -1, np.int32)
    written[0, :2], written[1, :2], written[2, :2] = (97, 98), (97, 120), (97, 256)
    masked = jax.jit(controls.masked)
    found = np.asarray(masked(np.zeros((3, 300), np.float32), written, 2))
    assert np.flatnonzero(np.isfinite(found[0])).tolist() == [256]
    assert np.flatnonzero(np.isfinite(found[1])).tolist() == [256]  # against the grammar already
    assert np.isfinite(found[2]).all()  # it has ended before
    assert controls == Controls((256,), limits=limits_of(grammar="regex:ab"))
    assert hash(controls) != hash(Controls((256,), limits=limits_of(grammar="regex:ac")))
