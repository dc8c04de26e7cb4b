"""Programs compiled for described devices: the training step of `lm train`, and others.

Nothing is allocated: state and batch are only shapes.
"""

from __future__ import annotations

import re
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import jax
from jax.stages import Compiled, Lowered

from lm.errors import UserError
from lm.experiment import Experiment
from lm.tools.planning.described_device import kernels_for
from lm.tools.planning.hlo import FREE, Instruction, Module, Shape, parse_hlo

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
SIZE = r"([\d.]+)([KMGT]?)i?B?"


@dataclass(frozen=True)
class Program:
    """Compiled program: its text, and bytes per device.

    Attributes:
        text: HLO text.
        arguments: Arguments.
        outputs: Outputs that do not reuse donated memory.
        temporaries: Temporaries.
        code: Program code.
        peak: Maximum live bytes, excluding code; None if unknown.
        host: Temporaries and arguments in host memory.
        seconds: Time to lower and compile.
    """

    text: str
    arguments: int
    outputs: int
    temporaries: int
    code: int
    peak: int | None
    host: int
    seconds: float

    @property
    def total(self) -> int:
        """Bytes of all parts together."""
        return self.arguments + self.outputs + self.temporaries + self.code

    @property
    def needed(self) -> int:
        """Maximum live bytes by the compiler's peak; the total if unknown."""
        return self.total if self.peak is None else self.peak + self.code


@dataclass(frozen=True)
class OutOfMemory:
    """Sizes of a program that does not fit, from the compiler's message; 0 if not given.

    Attributes:
        total: Bytes that the program needs, including its arguments.
        capacity: Memory of the device.
        largest: Bytes and description of the largest arrays.
        seconds: Time until the compiler failed.
    """

    total: int
    capacity: int
    largest: tuple[tuple[int, str], ...]
    seconds: float

    @property
    def needed(self) -> int:
        """Bytes that the program needs."""
        return self.total


def batch_shapes(experiment: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of the batches of one dispatch, [steps, B, …]."""
    n_steps = experiment.config.train.steps_per_dispatch
    return {
        name: jax.ShapeDtypeStruct((n_steps, *shape.shape), shape.dtype)
        for name, shape in experiment.batch_shapes.items()
    }


def lower(experiment: Experiment) -> Lowered:
    """Lower one dispatch of training for the devices of the experiment."""
    with kernels_for(experiment.mesh.devices):
        return experiment.train_steps.lower(experiment.state_shapes, batch_shapes(experiment))


def compile_step(experiment: Experiment) -> Program | OutOfMemory:
    """Compile the step; a program that does not fit is a result, not an error."""
    start = time.monotonic()
    return compile_lowered(lower(experiment), experiment, start)


def compile_lowered(
    lowered: Lowered, experiment: Experiment, start: float
) -> Program | OutOfMemory:
    """Compile a lowered program of an experiment; see `compile_step`.

    Args:
        lowered: program.
        experiment: experiment on described devices.
        start: `time.monotonic` at the start of lowering.

    Raises:
        UserError: the compiler rejects the program for a reason other than memory.
    """
    try:
        with warnings.catch_warnings():
            # A cached program cannot be loaded for devices that are not present.
            warnings.filterwarnings("ignore", message="Error reading persistent compilation cache")
            compiled = compile_untuned(lowered)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            platform = experiment.mesh.devices.flat[0].platform
            reason = str(error).partition("\n")[0]
            raise UserError(f"the {platform} compiler rejects the program: {reason}") from error
        found = read_out_of_memory(str(error), time.monotonic() - start)
        return found if found.largest else replace(found, largest=_dumped_arrays(lowered))
    return program_of(compiled, experiment, time.monotonic() - start)


def compile_untuned(lowered: Lowered) -> Compiled:
    """Compile a program without the GPU that XLA would tune its matrix products on.

    Untuned, XLA rejects products that its default tiles do not divide, as of 1,500 positions. They
    are then left to cuBLAS.
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "tile sizes" not in str(error):
            raise
    return lowered.compile({"xla_gpu_enable_triton_gemm": False})


def program_of(compiled: Compiled, experiment: Experiment, seconds: float) -> Program:
    """Describe a compiled step of an experiment, with its compile time in seconds."""
    memory = compiled.memory_analysis()
    assert memory is not None
    on_tpu = experiment.mesh.devices.flat[0].platform == "tpu"
    return Program(
        text=compiled.as_text() or "",
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        # libtpu rejects programs by their peak, less than the sum; on CPU it is too small.
        peak=memory.peak_memory_in_bytes or None if on_tpu else None,
        host=memory.host_temp_size_in_bytes + memory.host_argument_size_in_bytes,
        seconds=seconds,
    )


def _dumped_arrays(lowered: Lowered) -> tuple[tuple[int, str], ...]:
    """Return the largest arrays of a program that does not fit, from the compiler's dump.

    libtpu only reports the sum of the temporaries. The dump is written before memory assignment,
    and a compilation that fails there is quick.
    """
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            lowered.compile(options)
        except jax.errors.JaxRuntimeError:
            dumped = sorted(Path(folder).rglob("*after_optimizations.txt"))
            return largest_arrays(parse_hlo(dumped[0].read_text())) if dumped else ()
    return ()


def read_out_of_memory(message: str, seconds: float) -> OutOfMemory:
    """Parse the compiler's out-of-memory message, which has two forms."""
    # libtpu includes the arguments in the "temporaries" that it compares with the memory.
    used = re.search(rf"Used {SIZE} of {SIZE} hbm", message) or re.search(
        rf"HLO temporaries \({SIZE}\) exceeds available HBM \({SIZE}\)", message
    )
    total, capacity = (_bytes(*used.group(1, 2)), _bytes(*used.group(3, 4))) if used else (0, 0)
    found = re.findall(
        rf"Size: {SIZE}\s+(?:Operator: op_name=\"([^\"]*)\"[^\n]*\s+)?Shape: (\S+)", message
    )
    largest = tuple((_bytes(n, unit), f"{shape} {name}".strip()) for n, unit, name, shape in found)
    return OutOfMemory(total, capacity, largest, seconds)


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * UNITS[unit])


def largest_arrays(module: Module, n: int = 10) -> tuple[tuple[int, str], ...]:
    """Return bytes and description of the `n` largest arrays of a device.

    Includes arguments and results of allocating instructions; each pair of shape and operation is
    listed once.
    """
    found: dict[str, int] = {}
    arguments = module.computations[module.entry].parameters
    for instruction in (*arguments, *(done for _, done, _ in module.executions())):
        is_free = instruction.opcode in FREE and instruction not in arguments
        if is_free or instruction.opcode.endswith("-done"):
            continue
        for shape in instruction.shapes:
            if shape.space == 0 and shape.bytes:
                found.setdefault(f"{_shape_text(shape)} {_operation(instruction)}", shape.bytes)
    ranked = sorted(found.items(), key=lambda item: -item[1])
    return tuple((size, name) for name, size in ranked[:n])


def _shape_text(shape: Shape) -> str:
    return f"{shape.dtype}[{','.join(map(str, shape.dims))}]"


def _operation(instruction: Instruction) -> str:
    """Return the model operation or argument name, without JAX's scopes."""
    name = re.sub(r"\[\\?'([^'\\]*)\\?'\]", r"/\1", instruction.op_name)
    name = re.sub(r"tokamax:\{.*\}(?=/|$)", "tokamax", name)
    name = re.sub(r"^args\[(\d)\]", lambda found: ("state", "batch")[int(found[1])], name)
    scopes = [
        scope
        for scope in name.split("/")
        if not re.fullmatch(r"jit\(.*\)|while|body|closed_call|checkpoint", scope)
    ]
    return "/".join(scopes) or instruction.name
