"""Token stores in an emulated bucket: batches as from a local disk, checked on arrival."""

import os
import socket
import subprocess
import sys

import fsspec
import numpy as np
import pytest
from emulated_bucket import emulated_bucket

from lm.config import default
from lm.data import dataset, file_parts, shard_cache, sharded_store
from lm.data.batches import Batches, shuffle_endlessly
from lm.data.dataset import open_dataset
from lm.data.store import token_windows
from lm.data.verification import verify_stores
from lm.errors import UserError


@pytest.fixture(scope="module")
def bucket():
    """The address of a bucket, for this process and those that it starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with emulated_bucket("stores", port) as address:
        yield address


@pytest.fixture
def open_cached(tmp_path, monkeypatch):
    """Opens the data set of files of lines, whose store is in a cache, in small shards or whole."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(6):
        lines = (f"{number} {i} " + "word " * (i * i % 60) for i in range(60))
        (folder / f"{number}.txt").write_text("\n".join(lines))
        os.utime(folder / f"{number}.txt", ns=(10**18, 10**18))
    monkeypatch.setattr(shard_cache, "PIECE", 2**17)

    def opened(cache, shard=9000, **options):
        monkeypatch.setattr(dataset, "ONE_STORE", 0 if shard else 2**28)
        monkeypatch.setattr(file_parts, "RANGE", shard or 2**28)
        monkeypatch.setattr(sharded_store, "SHARD", shard or 2**28)
        monkeypatch.setenv("LM_CACHE_DIR", str(tmp_path / "local"))
        data = default().data
        data.source, data.directory, data.documents = "text:*.txt", str(folder), "line"
        data.cache_directory, data.workers, data.validation_fraction = str(cache), 1, 0.1
        data.update(options)
        return open_dataset(data)

    return opened


def batches(store):
    examples = token_windows(store, 32, 32, isolate=True, drop_remainder=True)
    order = shuffle_endlessly(examples, seed=3)
    made = Batches(order, lambda example, rng: dict(example), 4, seed=3)
    return [made.rows(step, range(4)) for step in (7, 0, 40, 7)]


def test_batches_are_the_same_from_disk_and_bucket_in_one_shard_and_many(
    bucket, open_cached, tmp_path
):
    kinds = {
        "whole": (tmp_path / "whole", 0),
        "disk": (tmp_path / "disk", 9000),
        "one shard": (tmp_path / "one", 10**9),
        "bucket": (f"{bucket}/a", 9000),
        "bucket, small cache": (f"{bucket}/a", 9000),
        "bucket, one shard": (f"{bucket}/b", 10**9),
    }
    found = {}
    for name, (cache, shard) in kinds.items():
        opened = open_cached(cache, shard, shard_cache=0.0003 if "small" in name else 1.0)
        found[name] = (
            opened.fingerprint,
            [*batches(opened.train[0]), *batches(opened.validation[0])],
        )
        if "small" in name:
            pieces = list((tmp_path / "local").rglob("pieces/*/*/*"))
            assert 0 < sum(path.stat().st_size for path in pieces) < 0.0003 * 2**30
    fingerprint, expected = found["whole"]
    for name, (digests, ours) in found.items():
        assert digests == fingerprint, name
        for ours_, theirs in zip(ours, expected, strict=True):
            for key, values in theirs.items():
                np.testing.assert_array_equal(ours_[key], values, err_msg=name)


def flip(place, name, byte):
    fs, path = fsspec.core.url_to_fs(place)
    content = bytearray(fs.cat_file(f"{path}/{name}"))
    content[byte] ^= 1
    fs.pipe_file(f"{path}/{name}", bytes(content))


def test_flipped_bit_is_named_and_a_damaged_local_piece_is_fetched_again(
    bucket, open_cached, tmp_path
):
    store = open_cached(f"{bucket}/c").train[0]
    expected = store.tokens[:]
    for piece in (tmp_path / "local" / "pieces").rglob("*/0"):
        content = bytearray(piece.read_bytes())
        content[5] ^= 1
        piece.write_bytes(content)
    np.testing.assert_array_equal(open_cached(f"{bucket}/c").train[0].tokens[:], expected)
    flip(store.directory, "00001.shard", 5)
    data = default().data
    data.cache_directory = f"{bucket}/c"
    first, second = verify_stores(data, columns=(), of_config=False)
    assert len(first.problems) + len(second.problems) == 1
    assert "00001.shard: block 0 (bytes 0 to 65,536)" in str(first.problems + second.problems)
    for piece in (tmp_path / "local" / "pieces").rglob("*/0"):
        piece.unlink()
    store = open_cached(f"{bucket}/c").train[0]
    with pytest.raises(
        UserError, match=r"00001\.shard: block 0 \(bytes 0 to 65,536\) does not match"
    ):
        store.tokens[:]


BUILD = """
import sys
from lm.config import default
from lm.data import dataset, file_parts, sharded_store, shared_build

if __name__ == "__main__":
    dataset.ONE_STORE, file_parts.RANGE, sharded_store.SHARD = 0, 9000, 9000
    shared_build.POLL_SECONDS = 0.1
    data = default().data
    data.source, data.documents, data.tokenizer = "text:*.txt", "line", "byte"
    data.workers = 2
    data.directory, data.cache_directory = sys.argv[1:]
    print(dataset.open_dataset(data).fingerprint)
"""


def test_processes_build_a_store_in_the_bucket_together(bucket, open_cached, tmp_path, monkeypatch):
    expected = open_cached(tmp_path / "whole", 0, validation_fraction=0.0)
    script = tmp_path / "build.py"
    script.write_text(BUILD)
    words = [sys.executable, script, tmp_path / "corpus", f"{bucket}/d"]
    processes = []
    for number in range(2):  # each host has local digests of its own
        monkeypatch.setenv("LM_CACHE_DIR", str(tmp_path / f"host{number}"))
        processes.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True))
    for process in processes:
        assert process.communicate()[0] == f"{expected.fingerprint}\n"
        assert process.returncode == 0
    monkeypatch.setattr(sharded_store, "build_together", None)  # nothing is left to do
    found = open_cached(f"{bucket}/d", validation_fraction=0.0)
    np.testing.assert_array_equal(found.train[0].tokens, expected.train[0].tokens)


def test_corpus_in_the_bucket_gives_the_same_tokens(bucket, open_cached, tmp_path):
    expected = open_cached(tmp_path / "whole", 0)
    fs, _ = fsspec.core.url_to_fs(bucket)
    for path in (tmp_path / "corpus").iterdir():
        fs.pipe_file(f"stores/corpus/{path.name}", path.read_bytes())
    options = {"source": f"text:{bucket}/corpus/*.txt"}
    for _ in range(2):
        found = open_cached(tmp_path / "remote", **options)
        for split in ("train", "validation"):
            (ours,), (theirs,) = getattr(found, split), getattr(expected, split)
            np.testing.assert_array_equal(ours.tokens, theirs.tokens)
            assert ours.manifest.source_digest == theirs.manifest.source_digest


def test_bucket_that_is_not_there_is_a_one_line_error(bucket, open_cached):
    with pytest.raises(UserError, match="gs://no-such-bucket"):
        open_cached("gs://no-such-bucket/x")
