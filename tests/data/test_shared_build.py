"""Building files together: who builds a file, and when another host's claim is taken over."""

import json
import os
import types
from dataclasses import dataclass

import pytest

from lm.data import file_parts, shared_build
from lm.data.file_parts import piece_size
from lm.data.shared_build import DEAD_AFTER_SECONDS, RENEW_SECONDS, build_together, free_cores
from lm.data.shared_folder import open_shared_folder


@dataclass(frozen=True)
class Words:
    """Writing of a word."""

    name: str
    size: int = 1

    def make(self, path, report):
        path.write_text(f"made {self.name}")


class Clock:
    """Time that passes only by `sleep`, which tells an observer."""

    def __init__(self):
        self.now, self.observer = 0.0, lambda now: None

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.observer(self.now)


@pytest.fixture(params=["disk", "memory"])
def folder(request, tmp_path):
    return open_shared_folder(
        tmp_path / "shared" if request.param == "disk" else f"memory://{tmp_path.name}/shared"
    )


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    time = types.SimpleNamespace(monotonic=clock.monotonic, sleep=clock.sleep)
    monkeypatch.setattr(shared_build, "time", time)
    return clock


def claim(beat):
    """Claim of another host, where a process has the number of this one."""
    holder = {"nonce": "other", "machine": "another host", "process": os.getpid()}
    return json.dumps({**holder, "beat": beat, "done": 0}).encode()


def build(folder, *names):
    build_together(folder, [Words(name) for name in names], 1, "", False, [], lambda: None)


def test_file_of_a_host_that_died_is_made_after_a_minute(folder, clock):
    folder.write("1.claim", claim(3))
    build(folder, "0", "1")
    assert DEAD_AFTER_SECONDS < clock.now < DEAD_AFTER_SECONDS + 5
    assert folder.sizes() == {"0": 6, "1": 6}  # and no claims
    assert folder.read("1") == b"made 1"


def test_file_of_a_host_that_lives_is_left_to_it(folder, clock):
    folder.write("1.claim", claim(0))

    def renew(now):
        if now > 10 * DEAD_AFTER_SECONDS:
            folder.write("1", b"of the other host")
            folder.remove("1.claim")
        else:
            folder.write("1.claim", claim(int(now / RENEW_SECONDS)))

    clock.observer = renew
    build(folder, "0", "1")
    assert clock.now > 10 * DEAD_AFTER_SECONDS
    assert folder.read("1") == b"of the other host"


def test_claim_of_a_dead_host_expires_a_minute_after_renewal(folder, clock):
    folder.write("1.claim", claim(0))
    clock.observer = lambda now: now < 45 and folder.write("1.claim", claim(int(now / 10)))
    build(folder, "1")
    assert 40 + DEAD_AFTER_SECONDS < clock.now < 45 + DEAD_AFTER_SECONDS + 5


@pytest.mark.parametrize("content", [b"", b"[", b"3", b"\xff", b'{"process": "x"}'])
def test_damaged_claim_is_valid_for_a_minute(folder, clock, content):
    folder.write("1.claim", content)
    build(folder, "1")
    assert DEAD_AFTER_SECONDS < clock.now < DEAD_AFTER_SECONDS + 5
    assert folder.read("1") == b"made 1"


@pytest.mark.parametrize("left", [True, False])
def test_claim_of_a_process_killed_after_it_made_the_file_is_removed(folder, clock, left):
    folder.write("1", b"made 1")
    folder.write("1.claim", claim(0))
    build(folder, *(["0", "1"] if left else ["1"]))
    assert folder.sizes() == ({"0": 6, "1": 6} if left else {"1": 6})
    assert clock.now == 0


def test_builds_of_one_host_have_a_core_each(monkeypatch, tmp_path):
    monkeypatch.setattr(shared_build.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    with free_cores(3) as first, free_cores(9) as second, free_cores(9) as third:
        assert (first, second, third) == (3, 1, 1)
    with free_cores(9) as again:
        assert again == 4


def test_cores_of_a_folder_that_cannot_be_written_are_one(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(shared_build.tempfile, "gettempdir", lambda: str(tmp_path / "file"))
    with free_cores(9) as n:
        assert n == 1


@pytest.mark.parametrize("total", [3 * 10**8, 16 * 10**8, 10**12])
def test_work_on_a_corpus_is_divided_so_that_two_processes_end_together(total):
    piece = piece_size(total, file_parts.RANGE)
    n = -(-total // piece)
    assert -(-n // 2) / n < 0.53
    assert 2**24 <= piece <= file_parts.RANGE
