"""The planned program and memory equal those of training."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import pytest

from lm.data.batches import to_device
from lm.errors import UserError
from lm.experiment import build, build_with_data
from lm.tools.planning.plan import make_plan
from lm.tools.planning.program import (
    compile_lowered,
    compile_untuned,
    lower,
    read_out_of_memory,
)
from lm.tools.planning.topologies import topology


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_text_lowered_equals_that_of_training(tiny_config, mesh):
    """Training lowers with its real state and its real first batch."""
    config = tiny_config(train__microbatches=1, train__steps_per_dispatch=3)
    config.parallel.mesh.update({"data": 1, **mesh})
    planned = lower(build(config, topology("cpu:8").devices)).as_text()

    experiment, dataset = build_with_data(config, jax.devices())
    batches = experiment.train_batches(dataset)
    arrays = to_device(batches, range(3), experiment.batch_sharding)
    trained = experiment.train_steps.lower(experiment.init_state(), arrays).as_text()
    assert without_names(planned) == without_names(trained)


def without_names(text: str) -> str:
    """The main function of a module, with a digest of what it calls in place of its name: JAX
    numbers helpers by what else the process has traced."""
    name = r'@([\w.$-]+|"[^"]*")'
    functions = dict(re.findall(rf"func\.func \w+ {name}(\(.*?\n  \}})", text, re.S))

    @cache
    def body(function: str) -> str:
        return re.sub(name, lambda call: digest(call.group(1)), functions[function])

    def digest(called: str) -> str:
        known = called in functions
        return hashlib.sha256(body(called).encode()).hexdigest() if known else called

    assert len(functions) > 10
    return body("main")


def test_parameters_optimizer_and_arguments_match_the_real_state(tiny_config):
    config = tiny_config(parallel__preset="fsdp")
    memory = make_plan(config, topology("cpu:8")).memory
    experiment = build(config, jax.devices())
    state = experiment.init_state()

    def on_first_device(tree):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    assert memory.parameters == memory.gradients == on_first_device(state.params)
    assert memory.optimizer == on_first_device(state.opt_state)
    # Inputs, targets, weights, segments and positions: a row of 32 tokens a device, 4 bytes each.
    assert memory.arguments == on_first_device(state) + 5 * 32 * 4


def test_predicted_memory_matches_a_step_really_run():
    """In a process of its own, whose resident memory is measured."""
    script = Path(__file__).with_name("actual_memory.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=True
    )
    predicted, actual = map(int, done.stdout.split())
    assert predicted == pytest.approx(actual, rel=0.1)


# The first is written by hand after the long form of the message, the second libtpu 0.0.42 wrote.
BREAKDOWN = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. \
Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.

Total hbm usage >= 20.76G:
    reserved        264.00M
    program          20.50G
    arguments            0B

Largest program allocations in hbm:

  1. Size: 4.00G
     Operator: op_name="jit(f)/dot_general" source_file="f.py" source_line=3
     Shape: f32[32768,32768]{1,0:T(8,128)}
     Unpadded size: 4.00G
     ==========================

  2. Size: 512.0M
     Shape: bf16[16384,16384]{1,0:T(8,128)(2,1)}
     ==========================
"""
SHORT = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(16.70G) exceeds available HBM (15.75G)."
)
GIB = 2**30


def test_out_of_memory_message_is_parsed():
    found = read_out_of_memory(BREAKDOWN, 1.0)
    assert (found.total, found.capacity) == (20.5 * GIB, 15.75 * GIB)
    assert found.largest == (
        (4 * GIB, "f32[32768,32768]{1,0:T(8,128)} jit(f)/dot_general"),
        (GIB // 2, "bf16[16384,16384]{1,0:T(8,128)(2,1)}"),
    )
    found = read_out_of_memory(SHORT, 1.0)
    assert (found.total, found.capacity) == (int(16.7 * GIB), 15.75 * GIB)


def test_program_that_the_compiler_rejects_is_a_one_line_error(tiny_config):
    class Rejected:
        def compile(self, options=None):
            raise jax.errors.JaxRuntimeError("INTERNAL: no layouts\nat hlo.cc:1")

    experiment = build(tiny_config(), topology("cpu:8").devices)
    with pytest.raises(UserError, match=r"^the cpu compiler rejects the program: INTERNAL: .*s$"):
        compile_lowered(Rejected(), experiment, 0.0)


def test_products_that_untuned_tiles_do_not_divide_are_left_to_cublas():
    """XLA:GPU finds no tiles for some, such as those of 1,500 rows on an H100."""

    class WithoutTiles:
        def compile(self, options=None):
            if not options:
                raise jax.errors.JaxRuntimeError("INTERNAL: Couldn't find output tile sizes")
            return options

    assert compile_untuned(WithoutTiles()) == {"xla_gpu_enable_triton_gemm": False}


def test_parameters_and_optimizer_state_are_among_the_largest_arrays(tiny_config):
    """A table of 65,536 × 32 is the largest array of a tiny model, with its moments."""
    config = tiny_config(model__vocab_size=65_536, data__sequence_length=8, parallel__preset="data")
    largest = make_plan(config, topology("cpu:8")).largest
    table = "f32[65536,32] state."
    found = {name.removeprefix(table) for size, name in largest if name.startswith(table)}
    assert {name.partition("/")[0].rpartition(".")[2] for name in found} == {"params", "mu", "nu"}
    assert all(name.endswith("tokens/embedding") for name in found)
