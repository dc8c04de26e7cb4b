"""tiktoken files, as Llama 3's tokenizer.model: ids by the ranks of bytes, one line for damage."""

import base64
import functools
import itertools
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data.tokenizer import load_saved_tokenizer
from lm.data.tokenizers.folder import FolderTokenizer
from lm.data.tokenizers.tiktoken_file import LLAMA3_TOKENS, tiktoken_definition
from lm.errors import UserError

pytest.importorskip("tokenizers")

TOKENS = [bytes([i]) for i in range(256)]
TOKENS += [b"th", b"he", b" t", b"the", b" the", b" th", b"\xc3\xa9", b"aa", b"aaa", b"  ", b"cat"]
RANKS = {token: rank for rank, token in enumerate(TOKENS)}


def content(tokens=TOKENS):
    lines = (base64.b64encode(token).decode() + f" {i}\n" for i, token in enumerate(tokens))
    return "".join(lines).encode()


def reference(word):
    """Merge the pair of lowest rank until there is none; a whole token stays."""
    parts = [word] if word in RANKS else [bytes([byte]) for byte in word]
    while True:
        pairs = [(RANKS.get(a + b, 10**9), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
        rank, i = min(pairs, default=(10**9, 0))
        if rank == 10**9:
            return [RANKS[part] for part in parts]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@functools.cache
def tokenizer(directory):
    (directory / "tokenizer.model").write_bytes(content())
    return FolderTokenizer.read(directory)


@settings(deadline=None)
@given(st.text(st.sampled_from("theca é"), max_size=30))
def test_ids_match_the_ranks(tmp_path_factory, text):
    found = tokenizer(tmp_path_factory.getbasetemp())
    words = re.findall(r" ?[a-zé]+|\s+(?!\S)|\s+", text)
    expected = [i for word in words for i in reference(word.encode())]
    assert found.encode(text).tolist() == expected
    assert found.decode(found.encode(text)) == text


def test_special_tokens_are_llama_3s_unless_the_folder_names_others(tmp_path):
    n = len(TOKENS)
    (tmp_path / "tokenizer.model").write_bytes(content())
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "bos_token_id": n, "eos_token_id": [n + 1, n + 9]})
    )
    found = FolderTokenizer.read(tmp_path)
    assert (found.vocab_size, len(LLAMA3_TOKENS)) == (n + 256, 256)
    assert found.template.before == (n,)
    assert found.stop_ids == (n + 1, n + 9)
    assert found.token_id("<|eot_id|>") == n + 9
    found.save(tmp_path / "saved")
    assert load_saved_tokenizer(tmp_path / "saved").digest == found.digest
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|mine|>"]
    added = {str(n + i): {"content": name, "special": True} for i, name in enumerate(names)}
    about = {"added_tokens_decoder": added, "bos_token": names[0], "eos_token": names[1]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    found = FolderTokenizer.read(tmp_path)
    assert (found.vocab_size, found.token_id("<|mine|>")) == (n + 3, n + 2)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda c: c + b"%%% 267\n", "line 268 is not valid base64"),
        (lambda c: c + b"Y2F0 267\n", "line 268 is not a new token"),
        (lambda c: c + b"Y2F0Y2F0 269\n", "with the rank 267"),
        (lambda c: content(TOKENS[:9]), "no token for the byte 9"),
    ],
)
def test_damage_is_a_one_line_error(damage, problem):
    with pytest.raises(UserError, match=problem):
        tiktoken_definition(damage(content()), LLAMA3_TOKENS)
