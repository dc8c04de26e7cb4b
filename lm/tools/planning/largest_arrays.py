"""The largest arrays that a compiled program makes."""

from __future__ import annotations

import re

from lm.tools.planning.hlo import FREE, Instruction, Module, Shape


def largest_arrays(module: Module, n: int = 6) -> tuple[tuple[int, str], ...]:
    """Bytes and description of the `n` largest temporary arrays, each shape and place once.

    What an instruction makes counts, not what it only passes on; shapes are a device's own.
    """
    found: dict[str, int] = {}
    for _, instruction, _ in module.executions():
        if instruction.opcode in FREE or instruction.opcode.endswith("-done"):
            continue
        for shape in instruction.shapes:
            if shape.space == 0 and shape.bytes:
                found.setdefault(f"{_written(shape)} {_place(instruction)}", shape.bytes)
    ranked = sorted(found.items(), key=lambda item: -item[1])
    return tuple((size, name) for name, size in ranked[:n])


def _written(shape: Shape) -> str:
    return f"{shape.dtype}[{','.join(map(str, shape.dims))}]"


def _place(instruction: Instruction) -> str:
    """The name of the operation in the model without JAX's own levels."""
    levels = [
        level
        for level in instruction.op_name.split("/")
        if not re.fullmatch(r"jit\(.*\)|while|body|closed_call|checkpoint", level)
    ]
    return "/".join(levels) or instruction.name
