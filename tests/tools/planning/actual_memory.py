"""Print the bytes that a plan predicts for all devices together and those a step really takes."""

import ctypes
import re
from pathlib import Path

import jax

from lm.config import default, set_value
from lm.experiment import build
from lm.tools.planning.plan import make_plan
from lm.tools.planning.program import batch_shapes, lower
from lm.tools.planning.topologies import topology

VALUES = {
    "model.vocab_size": 2048,
    "model.n_layers": 4,
    "model.d_model": 384,
    "model.n_heads": 6,
    "data.sequence_length": 256,
    "data.batch_size": 16,
    "parallel.preset": "fsdp",
}


def status(field: str) -> int:
    """Bytes of VmRSS, what is resident now, or VmHWM, the most since it was reset."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found.group(1)) * 1024


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    config = default()
    for path, value in VALUES.items():
        set_value(config, path, value)
    place = topology("cpu:4")
    plan = make_plan(config, place)
    experiment = build(config, place.devices)
    init = experiment.init_state.lower().compile()
    step = lower(experiment).compile()
    zeros = jax.jit(
        lambda: {n: jax.numpy.zeros(s.shape, s.dtype) for n, s in batch_shapes(experiment).items()},
        out_shardings=experiment.batch_sharding,
    )
    zeros = zeros.lower().compile()

    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = status("VmRSS")
    state, batch = jax.block_until_ready((init(), zeros()))
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    jax.block_until_ready(step(state, batch))
    print((plan.memory.total - plan.memory.code) * 4, status("VmHWM") - before)


main()
