"""Digests of files are remembered until the files change."""

import json
import os
import subprocess
import sys
import time

import pytest

from lm.data import file_digests
from lm.data.file_digests import file_digest, hash_files

OLD = 10**18  # nanoseconds: long ago


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two old files, and the list of those that are read."""
    monkeypatch.setattr(file_digests, "_cache", lambda: tmp_path / "cache")
    read = []
    digest = file_digests.hashlib.file_digest
    monkeypatch.setattr(
        file_digests.hashlib,
        "file_digest",
        lambda file, name: read.append(os.path.basename(file.name)) or digest(file, name),
    )
    paths = tmp_path / "a.txt", tmp_path / "é\udce9.txt"
    for path in paths:
        write(path, b"some text")
    return paths, read


def write(path, content, mtime=OLD):
    path.write_bytes(content)
    os.utime(path, ns=(mtime, mtime))


def new_start(monkeypatch):
    monkeypatch.setattr(file_digests, "_files", {})


def test_contents_are_read_once(files, monkeypatch):
    (first, second), read = files
    before = hash_files((first, second), "x")
    new_start(monkeypatch)
    assert hash_files((first, second), "x") == before
    assert read == ["a.txt", "é\udce9.txt"]


@pytest.mark.parametrize("change", ["content", "size", "time", "copy"])
def test_file_in_another_state_is_read_again(files, monkeypatch, change):
    (first, _), read = files
    before = file_digest(first)
    if change == "content":  # of the same size, with its old time put back
        write(first, b"some tixt")
    elif change == "size":
        write(first, b"some text.")
    elif change == "time":
        os.utime(first, ns=(OLD + 1, OLD + 1))
    else:
        first.unlink()
        write(first, b"some text")
    new_start(monkeypatch)
    assert (file_digest(first) == before) == (change in ("time", "copy"))
    assert read == ["a.txt", "a.txt"]


def test_file_that_was_just_written_is_not_trusted(files, monkeypatch):
    (first, _), read = files
    os.utime(first)
    file_digest(first)
    file_digest(first)
    assert read == ["a.txt", "a.txt"]


@pytest.mark.parametrize("damage", [b"", b"\0\0\n", b'["', b"[[[\n", b'[1, [2], "3"]\n{}\n3'])
def test_damaged_file_of_digests_is_read_as_far_as_it_is_whole(files, monkeypatch, damage):
    (first, second), read = files
    file_digest(first)
    path = file_digests._cache() / "digests.jsonl"
    path.write_bytes(path.read_bytes() + damage)
    new_start(monkeypatch)
    file_digest(second)
    new_start(monkeypatch)
    assert file_digest(first) == file_digest(second)
    assert read == ["a.txt", "é\udce9.txt"]


def test_processes_add_to_one_file(files, tmp_path):
    code = """
import sys
import time
from pathlib import Path
from lm.data import file_digests
file_digests.use_cache(lambda: Path(sys.argv[1], "cache"))
for number in range(50):
    file_digests.file_digest(Path(sys.argv[1], f"{sys.argv[2]}{number}"))
"""
    for name in "abcd":
        for number in range(50):
            write(tmp_path / f"{name}{number}", f"{name}{number}".encode())
    words = [sys.executable, "-c", code, tmp_path]
    processes = [subprocess.Popen([*words, name]) for name in "abcd"]
    assert [process.wait() for process in processes] == [0] * 4
    _, read = files
    for name in "abcd":
        for number in range(50):
            file_digest(tmp_path / f"{name}{number}")
    assert read == []


def test_lines_out_of_date_are_removed(files, monkeypatch):
    (first, second), _ = files
    monkeypatch.setattr(file_digests, "_SPARE_LINES", 3)
    file_digest(second)
    for number in range(20):
        os.utime(first, ns=(OLD + number, OLD + number))
        file_digest(first)
    new_start(monkeypatch)
    file_digest(first)
    lines = (file_digests._cache() / "digests.jsonl").read_text().split("\n")
    assert len([json.loads(line) for line in lines if line]) < 10


def test_unwritable_cache_only_costs_time(files, tmp_path, monkeypatch):
    (first, _), read = files
    (tmp_path / "cache").write_text("a file")
    before = file_digest(first)
    new_start(monkeypatch)
    assert file_digest(first) == before
    assert read == ["a.txt", "a.txt"]


def test_identity_of_a_new_file_stays_the_same(files, monkeypatch):
    (first, _), read = files
    monkeypatch.setattr(file_digests, "_RACY_NS", 3 * 10**8)
    first.write_bytes(b"new text")  # now
    with file_digests.hashing("identity"):
        before = hash_files([first])
        new_start(monkeypatch)
        time.sleep(0.4)
        assert hash_files([first]) == before
    assert not read


def test_known_file_is_not_hashed_while_it_is_read(files):
    (first, second), _ = files
    file_digest(first)
    with file_digests.hashing_reads():
        for path in (first, second):
            with file_digests.raw_file(path) as file:
                file.read()
        assert [path for path, _ in file_digests._while_read] == [second]
