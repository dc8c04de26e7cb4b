import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lm.data.store
import lm.progress
from lm.data.sources import Chunk, cut_document
from lm.data.store import build_token_store
from lm.data.tokenizers.basic import ByteTokenizer, CharTokenizer
from lm.data.tokenizers.sentencepiece import SentencePieceTokenizer, train_sentencepiece
from lm.errors import UserError


@dataclass(frozen=True)
class Texts:
    """A corpus in memory; `log` gets a line each time it is read."""

    documents: tuple[str, ...]
    log: Path | None = None
    killed_after: int | None = None
    seconds: float = 0.0
    name: str = "texts"
    size: int | None = None
    digest: str = field(default="", init=False)

    def __post_init__(self):
        object.__setattr__(self, "digest", repr(self.documents))

    def chunks(self) -> Iterator[Chunk]:
        if self.log:
            with open(self.log, "a") as file:
                file.write("read\n")
        time.sleep(self.seconds)
        for index, document in enumerate(self.documents):
            if index == self.killed_after:
                os.kill(os.getpid(), signal.SIGKILL)
            yield from cut_document([document])


@pytest.fixture(scope="module")
def with_bos_and_eos():
    text = "".join(f"some {i} words {i * i} more\n" for i in range(2000))
    return SentencePieceTokenizer(train_sentencepiece([text], 330))


def expected_tokens(documents, tokenizer):
    """The stored form, written down directly."""
    parts, offsets = [], [0]
    for document in documents:
        tokens = tokenizer.encode(document).tolist()
        if tokenizer.bos_id is not None:
            tokens = [tokenizer.bos_id, *tokens]
        if tokenizer.eos_id != tokenizer.bos_id:
            tokens = [*tokens, tokenizer.eos_id]
        parts += tokens
        offsets.append(len(parts))
    if tokenizer.eos_id is not None and tokenizer.eos_id == tokenizer.bos_id:
        parts.append(tokenizer.eos_id)
    return parts, offsets


DOCUMENTS = tuple(f"Dokument {i}\n" + "größer\n" * (17 * i % 900) for i in range(60))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_store_holds_the_tokens_of_direct_tokenization(
    tmp_path, monkeypatch, with_bos_and_eos, workers
):
    monkeypatch.setattr("lm.data.sources.CHUNK", 900)  # several pieces a document
    monkeypatch.setattr(lm.data.store, "CHUNK", 5000)  # several pieces a block
    monkeypatch.setattr(lm.data.store, "_SMALL", 100)  # worker processes at once
    kinds = [ByteTokenizer(), CharTokenizer.fit(DOCUMENTS)]
    for tokenizer in kinds if workers < 3 else [with_bos_and_eos]:
        store = build_token_store(Texts(DOCUMENTS), tokenizer, tmp_path, workers)
        tokens, offsets = expected_tokens(DOCUMENTS, tokenizer)
        assert store.tokens.tolist() == tokens
        assert store.offsets.tolist() == offsets
        assert store.tokens.dtype == np.uint16
        assert store.manifest.n_tokens == len(tokens)
        assert store.manifest.n_documents == len(DOCUMENTS)
        assert store.manifest.n_characters == sum(map(len, DOCUMENTS))
        assert store.manifest.n_bytes == sum(len(text.encode()) for text in DOCUMENTS)
        assert store.manifest.n_words == sum(len(text.split()) for text in DOCUMENTS)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text("aé \n", min_size=1), min_size=1))
def test_any_documents_are_stored(tmp_path_factory, documents):
    store = build_token_store(
        Texts(tuple(documents)), ByteTokenizer(), tmp_path_factory.mktemp("c"), 1
    )
    tokens, offsets = expected_tokens(documents, ByteTokenizer())
    assert store.tokens.tolist() == tokens
    assert store.offsets.tolist() == offsets


def test_large_vocabularies_take_32_bits(tmp_path):
    tokenizer = CharTokenizer("".join(map(chr, range(0x10000, 0x10000 + 70_000))))
    store = build_token_store(Texts((tokenizer.alphabet[-3:],)), tokenizer, tmp_path)
    assert store.tokens.dtype == np.uint32
    assert store.tokens.tolist() == [69_997, 69_998, 69_999]


def test_finished_store_is_not_built_again(tmp_path):
    texts = Texts(("one", "two"), log=tmp_path / "log")
    for _ in range(3):
        build_token_store(texts, ByteTokenizer(), tmp_path)
    assert (tmp_path / "log").read_text() == "read\n"
    build_token_store(texts, CharTokenizer.fit(texts.documents), tmp_path)
    assert (tmp_path / "log").read_text() == "read\n" * 2


def in_processes(function, arguments):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=function, args=args) for args in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_several_processes_build_a_store_once(tmp_path):
    texts = Texts(DOCUMENTS, log=tmp_path / "log", seconds=1.0)
    exit_codes = in_processes(build_token_store, [(texts, ByteTokenizer(), tmp_path, 1)] * 3)
    assert exit_codes == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "read\n"


def test_killed_build_is_detected_and_repeated(tmp_path, capfd):
    dying = Texts(DOCUMENTS, killed_after=30)
    assert in_processes(build_token_store, [(dying, ByteTokenizer(), tmp_path, 1)]) == [
        -signal.SIGKILL
    ]
    (left_over,) = (tmp_path / "stores").glob("*.partial")
    assert not (left_over / "manifest.json").exists()
    store = build_token_store(Texts(DOCUMENTS), ByteTokenizer(), tmp_path)
    assert store.tokens.tolist() == expected_tokens(DOCUMENTS, ByteTokenizer())[0]
    assert "was interrupted: building it again" in capfd.readouterr().err
    assert not left_over.exists()


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "short", "gone"])
def test_damaged_store_is_noticed_and_built_again(tmp_path, capfd, name, damage):
    texts = Texts(("one", "two"))
    path = build_token_store(texts, ByteTokenizer(), tmp_path).directory / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: -8 if damage == "short" else -1])
    store = build_token_store(texts, ByteTokenizer(), tmp_path)
    assert store.tokens.tolist() == expected_tokens(texts.documents, ByteTokenizer())[0]
    assert "is damaged" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "disk is full"), (errno.EROFS, "be written")],
)
def test_unwritable_disk_is_reported_and_leaves_no_files(tmp_path, monkeypatch, code, words):
    def fail(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(lm.data.store, "write_durably", fail)
    with pytest.raises(UserError, match=f"{words}.*--config.data.cache_directory"):
        build_token_store(Texts(("one",)), ByteTokenizer(), tmp_path)
    assert [path.suffix for path in (tmp_path / "stores").iterdir()] == [".lock"]


def test_errors_of_worker_processes_reach_the_user(tmp_path, monkeypatch):
    monkeypatch.setattr(lm.data.store, "_SMALL", 1)
    with pytest.raises(UserError, match="U\\+007A"):
        build_token_store(Texts(("a" * 100, "z")), CharTokenizer("a"), tmp_path, 2)


class KillsItsProcess(ByteTokenizer):
    def encode(self, text):
        os.kill(os.getpid(), signal.SIGKILL)


def test_killed_worker_process_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(lm.data.store, "_SMALL", 1)
    with pytest.raises(UserError, match=r"was killed.*workers"):
        build_token_store(Texts(("a" * 100,)), KillsItsProcess(), tmp_path, 2)


ENDLESS = """
import functools
import itertools
import numpy as np
from lm.data.sources import cut_document
from lm.data.store import encode_chunks
from lm.data.tokenizers.basic import ByteTokenizer
from lm.data.tokenizing_pool import encode_in_processes

if __name__ == "__main__":
    groups = (list(cut_document(["text"])) for _ in itertools.count())
    encode = functools.partial(encode_chunks, ByteTokenizer(), np.dtype("u2"))
    for _ in encode_in_processes(groups, encode, 2):
        print("working", flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_worker_survives_the_kill_of_its_parent(tmp_path):
    (tmp_path / "endless.py").write_text(ENDLESS)
    words = [sys.executable, tmp_path / "endless.py"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as parent:
        assert parent.stdout.readline() == b"working\n"
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        parent.kill()
    assert len(children) == 3  # two workers and multiprocessing's resource tracker
    until = time.monotonic() + 10
    while alive := [pid for pid in children if Path("/proc", pid, "exe").exists()]:
        assert time.monotonic() < until, alive
        time.sleep(0.05)


def test_documents_without_tokens_are_none(tmp_path):
    class Letters(CharTokenizer):
        def encode(self, text):
            return super().encode(text.replace(" ", ""))

    store = build_token_store(Texts(("ab", "  ", "b")), Letters("ab"), tmp_path, 1)
    assert store.offsets.tolist() == [0, 2, 3]
    with pytest.raises(UserError, match="texts contains no tokens"):
        build_token_store(Texts((" ",)), Letters("ab"), tmp_path, 1)


def test_progress_is_shown_on_stderr(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(lm.progress, "_SECONDS_A_LINE", 0)
    build_token_store(Texts(("one",)), ByteTokenizer(), tmp_path / "a", progress=True)
    build_token_store(Texts(("one",)), ByteTokenizer(), tmp_path / "b", progress=False)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.count("tokenizing texts") >= 1
    build_token_store(Texts(("one",)), ByteTokenizer(), tmp_path / "c", progress=False)
    assert capfd.readouterr().err == ""


def test_store_of_equal_content_has_the_requested_name(tmp_path):
    stores = [
        build_token_store(Texts(("a", "b"), name=name), ByteTokenizer(), tmp_path, 1)
        for name in ("first", "second")
    ]
    assert [store.manifest.source for store in stores] == ["first", "second"]
    assert stores[0].directory == stores[1].directory
