"""Tokenizer files with any value in any place work, or give a one-line error."""

import hashlib
import json

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data.special_tokens import special_tokens
from lm.data.tokenizer import load_saved_tokenizer
from lm.data.tokenizers.basic import CharTokenizer, WordTokenizer
from lm.errors import UserError
from lm.interop.tensor_files import read_tensors
from lm.interop.tokenizer_files import read_tokenizer

tokenizers = pytest.importorskip("tokenizers")
models, pre = tokenizers.models, tokenizers.pre_tokenizers

HOSTILE = [None, True, -1, 0, 1, 2**31, 10**30, -0.5, "", "a", "\ud800", "[UNK]", [], [1], {}]
HOSTILE += [{"content": 7}, {"a": {"a": 1}}, [None], "../x", "x" * 3000]
SETTINGS = {
    "tokenizer_config.json": {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "bos_token": "<s>",
        "do_lower_case": True,
        "added_tokens_decoder": {"300": {"content": "NEW", "special": True}},
    },
    "special_tokens_map.json": {"eos_token": {"content": "</s>"}},
    "added_tokens.json": {"NEW": 300},
    "generation_config.json": {"eos_token_id": [1, 2]},
    "config.json": {"model_type": "llama", "bos_token_id": 1, "decoder_start_token_id": 0},
}


def definition():
    made = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate("abcĠ")}, [("a", "b")][:0]))
    made.normalizer = tokenizers.normalizers.NFC()
    made.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        "<s> $A", "<s> $A $B", [("<s>", made.token_to_id("<s>"))]
    )
    return made.to_str().encode()


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    """Files by kind of vocabulary."""
    prefix = tmp_path_factory.mktemp("model") / "m"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b ab cab"] * 20),
        model_prefix=str(prefix),
        vocab_size=12,
        model_type="bpe",
        minloglevel=3,
    )
    pieces = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "a", "##b"]
    return {
        "definition": {"tokenizer.json": definition()},
        "model": {"tokenizer.model": prefix.with_suffix(".model").read_bytes()},
        "pieces": {"vocab.txt": "\n".join(pieces).encode()},
        "merges": {
            "vocab.json": json.dumps({"a": 0, "b": 1, "ab": 2, "Ġ": 3}).encode(),
            "merges.txt": b"#version: 0.2\na b\n",
        },
    }


def places(value, path=()):
    """Return the paths of all values in a JSON value."""
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    return [path, *(place for key, inner in items for place in places(inner, (*path, key)))]


def replaced(value, path, new):
    """Return a JSON value with another one in one place."""
    if not path:
        return new
    changed = list(value) if isinstance(value, list) else dict(value)
    changed[path[0]] = replaced(value[path[0]], path[1:], new)
    return changed


def damaged(data, files):
    """Draw one change of one file: of a JSON value, or of bytes."""
    name = data.draw(st.sampled_from(sorted(files)))
    content = files[name]
    if name.endswith(".json") and data.draw(st.booleans()):
        value = json.loads(content)
        path = data.draw(st.sampled_from(places(value)))
        value = replaced(value, path, data.draw(st.sampled_from(HOSTILE)))
        return files | {name: json.dumps(value).encode()}
    start = data.draw(st.integers(0, len(content)))
    junk = data.draw(st.sampled_from([b"", b"\0" * 9, b"\xff", b"[" * 99_999, b"9" * 5000, b"\n"]))
    rest = content[data.draw(st.integers(start, len(content))) :]
    return files | {name: content[:start] + junk + rest}


def outcome(use, *arguments):
    """Return the message of the error, or None."""
    try:
        use(*arguments)
    except UserError as error:
        return str(error)
    return None


def use_tokenizer(folder):
    tokenizer = read_tokenizer(folder)
    if tokenizer is None:
        return
    special_tokens(tokenizer)
    assert tokenizer.template is not None
    assert tokenizer.n_text_ids <= tokenizer.vocab_size
    for text in ("ab a NEW", "", "é<s>"):
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["definition", "model", "pieces", "merges"])
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_file_of_a_tokenizer_is_used_or_rejected(vocabularies, kind, data, tmp_path_factory):
    settings_files = {name: json.dumps(value).encode() for name, value in SETTINGS.items()}
    kept = data.draw(st.sets(st.sampled_from(sorted(settings_files))))
    files = vocabularies[kind] | {name: settings_files[name] for name in kept}
    folder = tmp_path_factory.mktemp("hostile")
    for name, content in damaged(data, files).items():
        (folder / name).write_bytes(content)
    message = outcome(use_tokenizer, folder)
    assert message is None or (str(folder) in message or "vocabulary" in message)


@pytest.mark.parametrize("kind", ["definition", "model"])
def test_any_value_in_the_files_beside_a_vocabulary_is_used_or_rejected(
    vocabularies, kind, tmp_path
):
    """Each of the hostile values in each place, all other files as they are."""
    stated = {name: json.dumps(value).encode() for name, value in SETTINGS.items()}
    files = vocabularies[kind] | stated
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name, value in SETTINGS.items():
        for path in places(value):
            for new in HOSTILE:
                (tmp_path / name).write_text(json.dumps(replaced(value, path, new)))
                message = outcome(use_tokenizer, tmp_path)
                assert message is None or "\n" not in message, (name, path, new)
        (tmp_path / name).write_bytes(stated[name])


SAVED = [CharTokenizer("abc"), WordTokenizer.from_list(b"<eos>\n<unk>\na\n", False)]


@pytest.mark.parametrize("tokenizer", SAVED, ids=lambda tokenizer: tokenizer.kind)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_saved_tokenizer_is_intact_or_rejected(tokenizer, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tokenizer.save(folder)
    saved = {file.name: file.read_bytes() for file in folder.iterdir()}
    changed = damaged(data, saved)
    if data.draw(st.booleans()):  # a digest of the damaged files
        about = outcome_json(changed["about.json"])
        if isinstance(about, dict) and isinstance(about.get("kind"), str):
            total = hashlib.sha256(about["kind"].encode(errors="replace"))
            for name, content in sorted(changed.items()):
                if name != "about.json":
                    total.update(name.encode() + hashlib.sha256(content).digest())
            changed["about.json"] = json.dumps(about | {"digest": total.hexdigest()}).encode()
    for name, content in changed.items():
        (folder / name).write_bytes(content)
    message = outcome(load_saved_tokenizer, folder)
    assert message is None or "no intact tokenizer" in message


def outcome_json(content):
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


@settings(deadline=None)
@given(data=st.data())
def test_any_index_of_tensors_is_used_or_rejected(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    index = {"metadata": {}, "weight_map": {"a": "x.safetensors"}}
    name = "model.safetensors.index.json"
    files = damaged(data, {name: json.dumps(index).encode()})
    (folder / name).write_bytes(files[name])
    assert str(folder) in outcome(read_tensors, folder)
