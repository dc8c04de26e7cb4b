"""The platform of a machine that has TPU software and no TPU, as developers' machines do."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import jax

GOOGLE = "0x1ae0"  # vendor on the PCI bus


def use_cpu_without_accelerators() -> None:
    """Let JAX take the CPU where libtpu would look for a TPU in vain, and complain at length."""
    looks_for_tpu = not os.environ.get("JAX_PLATFORMS") and importlib.util.find_spec("libtpu")
    if looks_for_tpu and not has_tpu() and not Path("/dev/nvidiactl").exists():
        jax.config.update("jax_platforms", "cpu")


def has_tpu() -> bool:
    """Whether a TPU is on this machine's PCI bus."""
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(vendor.read_text().strip() == GOOGLE for vendor in vendors)
