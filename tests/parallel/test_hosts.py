"""A machine with libtpu and no TPU takes the CPU by itself, and says nothing of TPUs."""

from __future__ import annotations

import jax
import pytest

from lm.parallel import hosts


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


def test_the_cpu_is_taken_where_libtpu_finds_no_tpu(chosen):
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
