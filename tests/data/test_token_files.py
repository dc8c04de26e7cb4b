"""Token files of nanoGPT, llm.c and Megatron-LM: their ids equal those of our own stores."""

import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm.data.dataset import build_store, open_corpus, open_dataset
from lm.data.store import build_token_store, token_windows
from lm.data.text import token_files
from lm.data.tokenizer import make_tokenizer
from lm.errors import UserError

VOCABULARY = b"<unk>\n<eos>\na\nb\nc\n"
END = 1


@pytest.fixture
def token_data(make_data, tmp_path):
    (tmp_path / "words.txt").write_bytes(VOCABULARY)

    def make(**changes):
        values = {"tokenizer": "words:words.txt", "token_dtype": "uint16", "end_token": ""}
        return make_data(**(values | changes))

    return make


def llm_c(tokens, magic=20240520, version=1):
    """The file that llm.c's data_common.py writes."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens)
    dtype = "<u2" if magic == 20240520 else "<u4"
    return header.tobytes() + np.asarray(tokens, dtype).tobytes()


def megatron_index(documents, code=8, item=2, modes=False, fairseq=False):
    """The index that IndexedDatasetBuilder.finalize writes; a document is a list of sequences."""
    lengths = [len(sequence) for document in documents for sequence in document]
    pointers = np.cumsum([0, *lengths])[:-1] * item
    bounds = np.cumsum([0, *map(len, documents)])
    counts = struct.pack("<Q", len(lengths))
    counts += b"" if fairseq else struct.pack("<Q", len(bounds))
    return (
        b"MMIDIDX\0\0"
        + struct.pack("<QB", 1, code)
        + counts
        + np.asarray(lengths, "<i4").tobytes()
        + np.asarray(pointers, "<i8").tobytes()
        + (b"" if fairseq else np.asarray(bounds, "<i8").tobytes())
        + (np.zeros(len(lengths), "i1").tobytes() if modes else b"")
    )


def store_of(spec, data, split="train"):
    source = open_corpus(spec, data, split)
    return build_store(source, make_tokenizer(data, ()), data, False)


def documents_of(store):
    tokens = np.asarray(store.tokens)[: store.offsets[-1]]
    return [part.tolist() for part in np.split(tokens, store.offsets[1:-1])]


_documents = st.lists(st.lists(st.sampled_from([0, 2, 3, 4]), min_size=1), min_size=1, max_size=6)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_documents, st.integers(1, 7), st.sampled_from(["raw", "llm.c", "llama", "two files"]))
def test_ids_of_nanogpt_match_our_store(token_data, tmp_path, documents, block, layout):
    stream = [token for document in documents for token in (*document, END)]
    for old in tmp_path.glob("*.bin"):
        old.unlink()
    if layout == "two files":  # cut within a document
        cut = len(stream) // 2
        (tmp_path / "f1.bin").write_bytes(llm_c(stream[:cut]))
        (tmp_path / "f2.bin").write_bytes(llm_c(stream[cut:]))
    else:
        raw = np.asarray(stream, "<u2").tobytes()
        llama = llm_c(stream, 20240801, 7)
        content = {"raw": raw, "llm.c": llm_c(stream), "llama": llama}[layout]
        (tmp_path / "f.bin").write_bytes(content)
    data = token_data(token_dtype="uint16" if layout == "raw" else "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_files, "_BLOCK", block)
        store = store_of("nanogpt:f*.bin", data)
    assert documents_of(store) == [[*document, END] for document in documents]
    assert store.manifest.n_documents == len(documents)


@pytest.mark.parametrize("first", [False, True])
def test_delimiter_starts_documents_as_in_token_stores(token_data, tmp_path, first, monkeypatch):
    """GPT-2's end of text both ends and starts: nanoGPT writes it last, llm.c first."""
    words = make_tokenizer(token_data(), ())
    monkeypatch.setattr(type(words), "bos_id", words.eos_id)
    (tmp_path / "f.txt").write_text("a b\nc\na\n")
    data = token_data(documents="line", isolate_documents=True)
    ours = build_token_store(open_corpus("text:f.txt", data, "train"), words, tmp_path / "own")
    assert ours.tokens.tolist() == [END, 2, 3, END, 4, END, 2, END]
    written = ours.tokens[:-1] if first else ours.tokens[1:]
    (tmp_path / "f.bin").write_bytes(written.astype("<u2").tobytes())
    theirs = store_of("nanogpt:f.bin", data)
    skipped = 0 if first else 1
    assert theirs.tokens.tolist() == ours.tokens[skipped:].tolist()
    assert theirs.offsets[1:].tolist() == (ours.offsets[1:] - skipped).tolist()
    documents = [[2, 3, END], [4, END], [2, END]]
    (tmp_path / "m.bin").write_bytes(np.concatenate(documents).astype("<u2").tobytes())
    (tmp_path / "m.idx").write_bytes(megatron_index([[document] for document in documents]))
    monkeypatch.setattr(token_files, "_BLOCK", 2)
    indexed = store_of("megatron:m", data)
    assert indexed.tokens.tolist() == ours.tokens[1:].tolist()
    assert indexed.offsets.tolist() == [0, *(ours.offsets[1:] - 1).tolist()]
    if not first:
        for window in range(2):
            two = [token_windows(s, 3, 3, True, False)[window] for s in (theirs, indexed)]
            assert all((two[0][name] == two[1][name]).all() for name in two[0])


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(_documents, min_size=1, max_size=5),
    st.sampled_from([(8, "<u2"), (4, "<i4"), (5, "<i8")]),
    st.booleans(),
    st.integers(1, 5),
)
def test_documents_of_megatron_match_its_index(token_data, tmp_path, documents, kind, modes, block):
    code, dtype = kind
    flat = [[token for sequence in document for token in sequence] for document in documents]
    (tmp_path / "p.bin").write_bytes(np.concatenate(flat).astype(dtype).tobytes())
    index = megatron_index(documents, code, np.dtype(dtype).itemsize, modes)
    (tmp_path / "p.idx").write_bytes(index)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_files, "_BLOCK", block)
        assert documents_of(store_of("megatron:p", token_data())) == flat
    sequences = [sequence for document in documents for sequence in document]
    index = megatron_index(documents, code, np.dtype(dtype).itemsize, fairseq=True)
    (tmp_path / "p.idx").write_bytes(index)
    assert documents_of(store_of("megatron:p", token_data())) == sequences


def test_documents_are_held_out_and_are_text(token_data, tmp_path):
    stream = [token for i in range(20) for token in (2, 2 + i % 3, END)]
    (tmp_path / "f.bin").write_bytes(np.asarray(stream, "<u2").tobytes())
    data = token_data(validation_fraction=0.25, source="nanogpt:f.bin")
    dataset = open_dataset(data)
    train, validation = documents_of(dataset.train[0]), documents_of(dataset.validation[0])
    assert (len(train), len(validation)) == (15, 5)
    everything = documents_of(store_of("nanogpt:f.bin", token_data()))
    assert sorted(train + validation) == sorted(everything)
    one = token_data(validation_fraction=0.25, source="nanogpt:f.bin", end_token="none")
    dataset = open_dataset(one)
    assert documents_of(dataset.train[0]) == [stream[:45]]
    assert documents_of(dataset.validation[0]) == [stream[45:]]
    texts = [chunk.text for chunk in open_corpus("nanogpt:f.bin", token_data(), "train").chunks()]
    assert texts == ["a a", "a b", "a c"] * 6 + ["a a", "a b"]


@pytest.mark.parametrize(
    ("content", "changes", "words"),
    [
        (np.asarray([2, 9, 1], "<u2").tobytes(), {}, r"token 1 \(byte 2\) is 9, beyond the 5 ids"),
        (np.asarray([2, 70000], "<u4").tobytes(), {}, r"token 2 \(byte 4\) is 4464"),
        (b"abc", {}, "not a multiple of uint16"),
        (b"", {}, "contains no"),
        (llm_c([2, 1]), {"token_dtype": "uint32"}, "holds uint16, not"),
        (llm_c([2, 1])[:-1], {"token_dtype": ""}, "truncated or damaged"),
        (struct.pack("<256i", 20240520, 9, *[0] * 254), {}, "of unknown version 9"),
        (b"\2\0", {"token_dtype": ""}, "has no header: set --config.data.token_dtype"),
        (b"\2\0", {"end_token": "zzz"}, "the tokenizer has no such token"),
        (b"\2\0", {"end_token": "99"}, "the tokenizer has no such token"),
        (b"\2\0", {"tokenizer": "words"}, "name the tokenizer that produced them"),
        (b"\2\0", {"tokenizer": "char"}, "name the tokenizer that produced them"),
    ],
)
def test_wrong_token_files_are_one_line_errors(token_data, tmp_path, content, changes, words):
    (tmp_path / "f.bin").write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        store_of("nanogpt:f.bin", token_data(**changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda index, tokens: (index[:-1], tokens), "truncated or damaged"),
        (lambda index, tokens: (index[:20], tokens), "or truncated"),
        (lambda index, tokens: (b"x" * 99, tokens), "not an index of Megatron"),
        (lambda index, tokens: (b"TNTIDX\0\0" + index, tokens), "old format"),
        (lambda index, tokens: (index, tokens[:-2]), r"m\.bin: has 4 bytes, but m\.idx is of 6"),
        (lambda index, tokens: (index[:17] + b"\7" + index[18:], tokens), "type 7"),
        (lambda index, tokens: (index[:-8] + b"\1" + index[-7:], tokens), "do not cover all"),
        (lambda index, tokens: (index, None), "no file matches"),
    ],
)
def test_wrong_indices_are_one_line_errors(token_data, tmp_path, damage, words):
    index = megatron_index([[[2, 3]], [[4]]])
    index, tokens = damage(index, np.asarray([2, 3, 4], "<u2").tobytes())
    (tmp_path / "m.idx").write_bytes(index)
    if tokens is not None:
        (tmp_path / "m.bin").write_bytes(tokens)
    with pytest.raises(UserError, match=words) as error:
        store_of("megatron:m", token_data())
    assert "\n" not in str(error.value)
