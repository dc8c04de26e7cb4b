"""Every flag in the table is known to the installed compilers."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import jax
import pytest

from lm.cli import _set_up_jax
from lm.hardware import (
    CHIPS,
    GPUS,
    TORI,
    TPUS,
    XLA_FLAGS,
    chip_flags,
    compiler_options,
    set_xla_flags,
)

ON_A_TPU = """
import jax
from jax.experimental import topologies
topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
"""


def start_jax(program: str, **variables: str) -> subprocess.CompletedProcess:
    quiet = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    environment = os.environ | quiet | variables
    words = [sys.executable, "-c", program]
    return subprocess.run(words, env=environment, capture_output=True, text=True)


def test_gpu_flags_are_known():
    """XLA parses the flags of every platform at its start, and aborts on one that it lacks."""
    done = start_jax("import jax; jax.devices()", XLA_FLAGS=" ".join(chip_flags("h100")))
    assert done.returncode == 0, done.stderr
    assert start_jax("import jax; jax.devices()", XLA_FLAGS="--xla_gpu_no_such=1").returncode != 0


@pytest.mark.skipif(not find_spec("libtpu"), reason="the TPU compiler is not installed")
def test_tpu_flags_are_known():
    every = sorted({flag for chip in TPUS for flag in chip_flags(chip)})
    done = start_jax(ON_A_TPU, LIBTPU_INIT_ARGS=" ".join(every))
    assert done.returncode == 0, done.stderr
    assert "Unknown" not in done.stderr
    done = start_jax(ON_A_TPU, LIBTPU_INIT_ARGS="--xla_tpu_no_such=1")
    assert "Unknown" in done.stderr


@pytest.mark.parametrize(("devices", "least"), [(1, 0), (2, 8)])
def test_simulated_devices_have_threads_for_collectives_that_wait(monkeypatch, devices, least):
    """`lm train --config experiments/stablelm.py:2-1.6b`, small, on fsdp=2 hung on two cores."""
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setenv("PJRT_NPROC", "")
    monkeypatch.delenv("PJRT_NPROC")
    _set_up_jax(SimpleNamespace(verb="train", cpu_devices=devices))
    assert int(os.environ.get("PJRT_NPROC", 0)) >= least


def test_compiled_in_flags_are_flags_of_their_chip():
    """Training and planning ask by the device; `--xla_flags` by the chip's name."""
    for chip in TORI:
        for kind in CHIPS[chip].device_kinds:
            options = compiler_options(SimpleNamespace(device_kind=kind))
            assert options
            compiled_in = {f"--{name}={str(value).lower()}" for name, value in options.items()}
            assert compiled_in <= {*chip_flags(chip)}
    assert compiler_options(SimpleNamespace(device_kind="TPU v5 lite")) is None
    assert {chip for flag in XLA_FLAGS for chip in flag.compiled_in} == {*TORI}


def test_every_flag_has_a_chip_and_a_reason():
    assert all(
        set(flag.chips) <= {*TPUS, *GPUS} and flag.chips and flag.reason for flag in XLA_FLAGS
    )
    assert len({flag.name for flag in XLA_FLAGS}) == len(XLA_FLAGS)
    assert all(chip_flags(chip) for chip in TPUS + GPUS)


def test_user_flags_come_last_and_win(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_triton_gemm_any=false")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "")
    set_xla_flags(GPUS[0])
    assert os.environ["XLA_FLAGS"].endswith("--xla_gpu_triton_gemm_any=false")
    set_xla_flags("v6e")
    assert "--xla_tpu_scoped_vmem_limit_kib=98304" in os.environ["LIBTPU_INIT_ARGS"].split()
