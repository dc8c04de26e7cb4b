"""Byte-level BPE by tiktoken gives the ids of `tokenizers` for any text, or is not used."""

import functools
import inspect
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import lm.data.tokenizers.hf
from lm.data.tokenizers.byte_level import (
    GPT2_WORDS,
    LLAMA3_WORDS,
    O200K_WORDS,
    QWEN_WORDS,
    tiktoken_encoder,
)
from lm.data.tokenizers.hf import BYTE_CHARACTERS, HuggingFaceTokenizer

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("tiktoken")

TRAINING = [
    inspect.getsource(json.encoder),
    "größer 漢字 かな 👩\u200d👧 \r\n\tIt's we'LL 12345\n" * 9,
]
# Every kind of character that a regular expression or a merge may take differently.
hostile = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
        st.text("aA1 \n", max_size=9),
        st.sampled_from(
            ["  x", " \n y", "\r\n", "\u2028", "\u0085", "\u3000", "\0", "\x10", "\x11"]
        ),
        st.sampled_from(
            ["'s", "'LL", "'ſ", "e\u0301", "👩\u200d👩\u200d👧", "\u0378", "\U0001e030"]
        ),
        st.sampled_from(["a", " ", "=", "漢", "\n", "\u00a0"]).map(lambda letter: letter * 130),
    ),
    max_size=8,
).map("".join)


def pre_tokenizer(words):
    if words == GPT2_WORDS:
        return tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(words), "isolated")
    letters = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return tokenizers.pre_tokenizers.Sequence([split, letters])


@functools.cache
def trained(words, normalizer=None):
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = pre_tokenizer(words)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=BYTE_CHARACTERS,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    made.train_from_iterator(TRAINING, trainer)
    if normalizer:
        made.normalizer = tokenizers.normalizers.NFC()
    made.encode_special_tokens = True
    return made


@functools.cache
def encoder(words, normalizer=None):
    return tiktoken_encoder(trained(words, normalizer), BYTE_CHARACTERS)


def expected(tokenizer, texts):
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def found(encoder, texts):
    return [ids.tolist() for ids in encoder.encode_batch(texts)]


@pytest.mark.parametrize(
    ("words", "normalizer"),
    [(GPT2_WORDS, None), (LLAMA3_WORDS, None), (QWEN_WORDS, "NFC"), (O200K_WORDS, None)],
)
def test_ids_of_any_texts_match_tokenizers(words, normalizer):
    @settings(max_examples=150)
    @given(st.lists(hostile, max_size=4))
    @example(["a ", " b", "", "  ", "\n", "x<|endoftext|>"])
    def check(texts):
        assert found(encoder(words, normalizer), texts) == expected(
            trained(words, normalizer), texts
        )

    check()


@pytest.mark.parametrize("words", [GPT2_WORDS, LLAMA3_WORDS])
def test_every_character_is_of_the_same_class(words):
    texts = ["".join(map(chr, part)) for part in (range(0xD800), range(0xE000, 0x32000))]
    assert found(encoder(words), texts) == expected(trained(words), texts)


@pytest.mark.parametrize("text", ["a", " ", " \n", "ab", "漢", "12", "=-", "👩\u200d"])
def test_long_texts_without_words(text):
    text = text * (2**18 // len(text)) + "x"
    assert found(encoder(GPT2_WORDS), [text]) == expected(trained(GPT2_WORDS), [text])


def changed(change, words=GPT2_WORDS):
    """Return the trained tokenizer after a change of its JSON."""
    definition = json.loads(trained(words).to_str())
    change(definition)
    made = tokenizers.Tokenizer.from_str(json.dumps(definition))
    made.encode_special_tokens = True
    return made


def unreached(definition):
    """Add a token that no merge makes, because its first two letters merge before."""
    model = definition["model"]
    first, *_ = model["merges"]
    token = first[0] + first[1] + "q"
    model["vocab"] |= {first[1] + "q": 600, token: 601}
    model["merges"] += [[first[1], "q"], [first[0], first[1] + "q"]]


def in_another_order(definition):
    """Give the tokens other ids than the order of their merges."""
    vocabulary = definition["model"]["vocab"]
    names = [name for name in vocabulary if name != "<|endoftext|>"]
    vocabulary |= dict(
        zip(names, sorted((vocabulary[n] for n in names), reverse=True), strict=True)
    )


def with_a_word(definition):
    definition["added_tokens"].append(
        {"id": 600, "content": "dump", "special": False, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    )


@pytest.mark.parametrize("change", [unreached, in_another_order, with_a_word])
def test_ids_match_unusual_vocabularies(change):
    made = changed(change)
    texts = [*TRAINING, "q".join(TRAINING[0].split()), "heq eq inq aq  dump\n"]
    assert found(tiktoken_encoder(made, BYTE_CHARACTERS), texts) == expected(made, texts)


def without_a_byte(definition):
    model = definition["model"]
    model["merges"] = [pair for pair in model["merges"] if "q" not in "".join(pair)]
    del model["vocab"]["q"]


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["pre_tokenizer"].update(add_prefix_space=True),
        lambda d: d["pre_tokenizer"].update(use_regex=False),
        lambda d: d.update(normalizer={"type": "Lowercase"}),
        lambda d: d["model"].update(dropout=0.5),
        lambda d: d["model"].update(end_of_word_suffix="</w>"),
        without_a_byte,
    ],
)
def test_unsupported_by_tiktoken_falls_back_to_tokenizers(change):
    assert tiktoken_encoder(changed(change), BYTE_CHARACTERS) is None


def test_merges_apart_from_each_other_are_left_to_tokenizers():
    model = {"type": "BPE", "dropout": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "ignore_merges": False}
    vocabulary = {letter: i for i, letter in enumerate(BYTE_CHARACTERS)}
    vocabulary |= {"ab": 256, "bc": 257, "abc": 258, "xy": 259}
    merges = [["a", "b"], ["b", "c"], ["ab", "c"], ["x", "y"], ["a", "bc"]]
    rank = lm.data.tokenizers.byte_level._ranks
    assert not rank(model | {"vocab": vocabulary, "merges": merges}, BYTE_CHARACTERS)[0]
    assert rank(model | {"vocab": vocabulary, "merges": merges[:-1]}, BYTE_CHARACTERS)[0]


def test_whole_words_that_tiktoken_would_merge_are_left_to_tokenizers():
    model = {"type": "BPE", "dropout": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "ignore_merges": True}
    vocabulary = {letter: i for i, letter in enumerate(BYTE_CHARACTERS)}
    vocabulary |= {"ab": 256, "abc": 257}
    model |= {"vocab": vocabulary, "merges": [["a", "b"]]}
    assert not lm.data.tokenizers.byte_level._ranks(model, BYTE_CHARACTERS)[0]


def test_much_text_takes_the_fast_way(monkeypatch):
    monkeypatch.setattr(lm.data.tokenizers.hf, "_MANY", 100)
    tokenizer = HuggingFaceTokenizer(trained(GPT2_WORDS).to_str().encode())
    texts = ["short", *TRAINING, "", "a<|endoftext|>b"]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [
        tokenizer.encode(text).tolist() for text in texts
    ]
    assert "_fast" in vars(tokenizer)
    few = HuggingFaceTokenizer(tokenizer.definition)
    assert few.encode_batch(["short"])[0].tolist() == few.encode("short").tolist()
    assert "_fast" not in vars(few)
