"""Stores in shards: the same tokens, however a corpus is divided and whoever builds it."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm.data import dataset, file_digests, file_parts, sharded_store, shards
from lm.data.dataset import open_corpus
from lm.data.sharded_store import open_sharded_store
from lm.data.store import build_token_store, token_windows
from lm.data.tokenizers.basic import ByteTokenizer, CharTokenizer
from lm.errors import UserError


class Delimited(CharTokenizer):
    """Characters with one id that both starts and ends documents, and no token for a space."""

    bos_id = eos_id = 0

    def encode(self, text):
        return super().encode(text.replace(" ", ""))


def write(folder: Path, lines_of_files, zipped=()) -> None:
    for number, lines in enumerate(lines_of_files):
        content = "".join(json.dumps({"text": text}) + "\n" for text in lines).encode()
        name = f"{number:03d}.jsonl"
        if number in zipped:
            name, content = f"{name}.gz", gzip.compress(content)
        (folder / name).write_bytes(content)
        os.utime(folder / name, ns=(10**18, 10**18))


@pytest.fixture
def small(monkeypatch):
    """Small ranges, shards and blocks, and a shard for every corpus."""
    monkeypatch.setattr(dataset, "ONE_STORE", 0)
    monkeypatch.setattr(file_parts, "RANGE", 100)
    monkeypatch.setattr(sharded_store, "SHARD", 150)
    monkeypatch.setattr(file_digests, "_files", {})


def same(found, expected) -> None:
    """Assert that two stores are equal, by every way of reading them."""
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.offsets, expected.offsets)
    assert found.tokens.dtype == expected.tokens.dtype
    sizes = ("n_tokens", "n_documents", "n_bytes", "n_characters", "n_words", "delimiter")
    assert [getattr(found.manifest, name) for name in sizes] == [
        getattr(expected.manifest, name) for name in sizes
    ]
    assert found.manifest.source_digest == expected.manifest.source_digest
    for value in range(-1, expected.n_tokens + 2):
        for side in ("left", "right"):
            assert found.offsets.searchsorted(value, side=side) == np.searchsorted(
                expected.offsets, value, side=side
            )
    for length, stride in ((1, 1), (3, 2), (7, 7)):
        if expected.n_tokens > length:
            for isolate in (True, False):
                options = length, stride, isolate, False
                ours, theirs = (token_windows(each, *options) for each in (found, expected))
                assert len(ours) == len(theirs)
                for index in range(len(theirs)):
                    for name, values in theirs[index].items():
                        np.testing.assert_array_equal(ours[index][name], values)


def result(function, *arguments):
    """What a function returns, or the message of its error."""
    try:
        return function(*arguments)
    except UserError as error:
        return str(error)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.lists(st.lists(st.text("ab \n", max_size=30), max_size=6), min_size=1, max_size=5),
    zipped=st.sets(st.integers(0, 4)),
    shard=st.integers(1, 300),
    cut=st.integers(1, 100),
    block=st.sampled_from([16, 64, 2**16]),
    fraction=st.sampled_from([0.0, 0.2, 0.5]),
    delimited=st.booleans(),
)
def test_tokens_do_not_depend_on_how_work_is_divided(
    tmp_path_factory, make_data, files, zipped, shard, cut, block, fraction, delimited
):
    folder = tmp_path_factory.mktemp("corpus")
    write(folder, [*files, ["some", "more", "of it", "and\n more"]], zipped)
    options = {"directory": str(folder), "validation_fraction": fraction}
    tokenizer = Delimited("\0ab \nsomeftidnr") if delimited else ByteTokenizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded_store, "SHARD", shard)
        patch.setattr(file_parts, "RANGE", cut)
        patch.setattr(shards, "BLOCK", block)
        for split in ("train", "validation") if fraction else ("train",):
            data = make_data(cache_directory=str(folder / "shards"), **options)
            corpus = open_corpus("jsonl:*", data, split)
            expected = result(build_token_store, corpus, tokenizer, folder / "whole", 1)
            for _ in range(2):
                corpus = open_corpus("jsonl:*", data, split)
                found = result(open_sharded_store, corpus, tokenizer, data, False)
                if isinstance(expected, str):
                    assert found == expected
                else:
                    same(found, expected)


def test_existing_unsharded_store_is_used(tmp_path, make_data, small):
    write(tmp_path, [["some", "text", "of a file"] * 9, ["more of it"]])
    data = make_data()
    whole = build_token_store(
        open_corpus("jsonl:*", data, "train"), ByteTokenizer(), tmp_path / "cache"
    )
    (tmp_path / "cache" / "digests.jsonl").unlink()
    (tmp_path / "cache" / "stores" / "other").mkdir()
    (tmp_path / "cache" / "stores" / "other" / "manifest.json").write_text("[")
    found = open_sharded_store(open_corpus("jsonl:*", data, "train"), ByteTokenizer(), data, False)
    assert found.directory == whole.directory
    assert not list((tmp_path / "cache" / "stores").glob("*.shards"))


@pytest.mark.parametrize("size", [20, 10**6])
@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_other_contents_with_the_same_size_and_time_are_noticed(
    tmp_path, make_data, small, monkeypatch, size, fraction
):
    monkeypatch.setattr(file_parts, "RANGE", size)
    for text in ("text", "tixt"):
        write(tmp_path, [["some", text, "of a file"] * 9, ["more of it"]])
        data = make_data(validation_fraction=fraction)
        corpus = open_corpus("jsonl:*", data, "train")
        found = open_sharded_store(corpus, ByteTokenizer(), data, False)
        expected = build_token_store(corpus, ByteTokenizer(), tmp_path / "whole", 1)
        assert found.manifest.source_digest == expected.manifest.source_digest
        assert found.tokens.tolist() == expected.tokens.tolist()


@pytest.mark.parametrize("fraction", [0.0, 0.2])
def test_build_reads_files_once_for_tokens_and_digests(
    tmp_path, make_data, small, monkeypatch, fraction
):
    monkeypatch.setattr(file_parts, "RANGE", 10**6)
    write(tmp_path, [["some", "text", "of a file"] * 9, [], ["more of it"], ["é\n"] * 5], {2})
    data = make_data(validation_fraction=fraction)
    found = []
    for reads in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if reads:  # none beside those of the documents
                patch.setattr(file_digests.hashlib, "file_digest", None)
            corpus = open_corpus("jsonl:*", data, "train")
            open_sharded_store(corpus, ByteTokenizer(), data, False)
            found.append(corpus.digest)
        shutil.rmtree(tmp_path / "cache")
    assert found[0] == open_corpus("jsonl:*", data, "train").digest == found[1]


# --- several processes

BUILD = """
import sys
import time
from lm.config import default
from lm.data import file_parts, sharded_store, shared_build
from lm.data.dataset import open_corpus
from lm.data.tokenizers.basic import ByteTokenizer

class Slow(ByteTokenizer):
    def encode(self, text):
        time.sleep(float(sys.argv[4]))
        return super().encode(text)

if __name__ == "__main__":
    file_parts.RANGE, sharded_store.SHARD = 2000, 4000
    shared_build.POLL_SECONDS = 0.1
    data = default().data
    data.directory, data.cache_directory, data.workers = *sys.argv[1:3], int(sys.argv[3])
    print("started", flush=True)
    corpus = open_corpus("jsonl:*", data, "train")
    store = sharded_store.open_sharded_store(corpus, Slow(), data, False)
    print(store.directory, corpus.digest, flush=True)
"""


@pytest.fixture
def corpus(tmp_path, make_data):
    """A corpus of 40 shards, the words that build its store slowly, and the store they build."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = [f"document {i} " + "of words " * (i % 30) for i in range(1200)]
    write(folder, [texts[i : i + 100] for i in range(0, 1200, 100)], zipped={3})
    script = tmp_path / "build.py"
    script.write_text(BUILD)
    data = make_data(directory=str(folder))
    expected = build_token_store(
        open_corpus("jsonl:*", data, "train"), ByteTokenizer(), tmp_path / "whole", 1
    )

    def start(cache, workers, seconds):
        words = [sys.executable, script, folder, cache, workers, seconds]
        return subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, text=True)

    return start, data, expected


def n_shards(cache) -> int:
    return len(list(Path(cache).glob("stores/*.shards/*.shard")))


def opened(cache, data):
    data.cache_directory = str(cache)
    return open_sharded_store(open_corpus("jsonl:*", data, "train"), ByteTokenizer(), data, False)


def equal(found, expected) -> None:
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.offsets, expected.offsets)


def wait_for(condition) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_two_builds_share_the_work_and_one_is_killed(tmp_path, corpus):
    start, data, expected = corpus
    cache = tmp_path / "shared"
    first, second = start(cache, 2, 0.003), start(cache, 2, 0.003)
    wait_for(lambda: n_shards(cache) > 5)
    first.kill()
    first.wait()
    for child in Path(f"/proc/{second.pid}/task/{second.pid}/children").read_text().split()[-1:]:
        os.kill(int(child), signal.SIGKILL)  # a worker
    assert second.wait() == 0
    assert n_shards(cache) == len(opened(cache, data).manifest.shards) > 30
    equal(opened(cache, data), expected)
    assert not list(cache.glob("stores/*/*.claim"))


def test_repeatedly_killed_build_continues(tmp_path, corpus):
    start, data, expected = corpus
    cache, made = tmp_path / "cut", []
    for enough in (5, 11, 17):
        process = start(cache, 1, 0.002)
        wait_for(lambda enough=enough: n_shards(cache) > enough)
        process.kill()
        process.wait()
        made.append({path: path.stat().st_ino for path in cache.glob("stores/*/*.shard")})
    assert start(cache, 1, 0).wait() == 0
    for before in made:  # none was made again
        assert all(path.stat().st_ino == inode for path, inode in before.items())
    assert len(made[0]) < len(made[-1])
    equal(opened(cache, data), expected)
