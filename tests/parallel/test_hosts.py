"""A machine with libtpu but no TPU uses the CPU automatically, without TPU messages."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import jax
import pytest

from lm.errors import LostPeerError, UserError
from lm.parallel import hosts
from lm.parallel.worker_processes import starting_workers


@pytest.fixture
def chosen(monkeypatch):
    """What the function tells JAX, on a machine without accelerators that has libtpu."""
    updates = {}
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(hosts, "find_spec", lambda name: name == "libtpu")
    monkeypatch.setattr(hosts, "has_tpu", lambda: False)
    monkeypatch.setattr(hosts.Path, "exists", lambda path: False)
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)
    return updates


def test_cpu_is_taken_where_libtpu_finds_no_tpu(chosen):
    hosts.use_cpu_without_accelerators()
    assert chosen == {"jax_platforms": "cpu"}


@pytest.mark.parametrize("reason", ["a TPU", "a GPU", "no libtpu", "the user's choice"])
def test_otherwise_jax_chooses(chosen, monkeypatch, reason):
    if reason == "a TPU":
        monkeypatch.setattr(hosts, "has_tpu", lambda: True)
    if reason == "a GPU":
        monkeypatch.setattr(hosts.Path, "exists", lambda path: True)
    if reason == "no libtpu":
        monkeypatch.setattr(hosts, "find_spec", lambda name: None)
    if reason == "the user's choice":
        monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    hosts.use_cpu_without_accelerators()
    assert chosen == {}


@pytest.mark.parametrize("address", ["localhost", "localhost:", "localhost:x", ":80", "h:99999"])
def test_address_without_a_port_is_an_error(address):
    with pytest.raises(UserError, match="expected HOST:PORT"):
        hosts.initialize_distributed(address, 2, 0)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_port_in_use_is_an_error(host):
    with socket.create_server((host, 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on port {port}"):
            hosts.initialize_distributed(f"127.0.0.1:{port}", 2, 0)


def test_process_without_peers_reports_the_address(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("DEADLINE_EXCEEDED: barrier timed out\nstack")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(LostPeerError, match=r"process 1 of 2 .* 127.0.0.1:4567.*timed out\)"):
        hosts.initialize_distributed("127.0.0.1:4567", 2, 1)


def test_errors_of_lost_peers_are_known_and_others_are_not(monkeypatch):
    lost = RuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")
    assert hosts.lost_peer(lost) is None  # a process alone has no peers
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert "another process" in hosts.lost_peer(lost)
    assert hosts.lost_peer(RuntimeError("RESOURCE_EXHAUSTED: out of memory")) is None


def test_waiting_for_a_process_that_never_comes_ends_with_a_line():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code = (
        "from lm.parallel import hosts; hosts._WAIT_SECONDS = 1.0; "
        f"hosts.initialize_distributed('127.0.0.1:{port}', 2, 0)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 1
    assert (
        f"error: process 0 of 2 could not reach the others at --coordinator 127.0.0.1:{port}"
        in (found.stderr)
    )


def test_workers_start_without_the_signals_of_their_group():
    environment, mask = dict(os.environ), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with starting_workers():
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with starting_workers():
        future = pool.submit(signal.pthread_sigmask, signal.SIG_BLOCK, [])
    with pool:
        assert {signal.SIGINT, signal.SIGHUP, signal.SIGUSR1} <= future.result()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
    assert dict(os.environ) == environment
