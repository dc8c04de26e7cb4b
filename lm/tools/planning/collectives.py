"""Collectives of a compiled program: bytes, mesh axes and devices.

`bytes` of a collective counts the full array on one device: the result of an all-gather, the
operand of a reduce-scatter or all-reduce. `sent` counts the bytes that a device sends with the best
ring algorithm: (n-1)/n of the array, twice that for an all-reduce.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from lm.tools.planning.hlo import Computation, Instruction, Module, Shape

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

WORK = ("fusion", "custom-call", "dot", "convolution", "while", "conditional", "call")


@dataclass(frozen=True)
class Route:
    """Mesh axes of a collective, as "data,fsdp", and the devices of one of its groups."""

    axis: str
    devices: tuple[Any, ...]


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind and route; `bytes` and `sent` are per device, summed over `count`."""

    kind: str
    route: Route
    asynchronous: bool
    count: int
    bytes: int
    sent: float


def collectives(module: Module, mesh: Mesh) -> list[Collective]:
    """List the collectives of a program, largest first; those in loops count by trip count."""
    found: dict[tuple[str, Route, bool], list[float]] = defaultdict(lambda: [0, 0, 0])
    for around, instruction, times in module.executions():
        for inside, part in module.inside(around, instruction):
            kind = _kind(inside, part)
            if not kind:
                continue
            route = _route(part, mesh)
            if len(route.devices) < 2:
                continue
            size = _size(inside, part)
            sent_fraction = _sent_fraction(kind, len(route.devices))
            totals = found[kind, route, _is_asynchronous(around, inside, instruction, part)]
            for i, value in enumerate((1, size, size * sent_fraction)):
                totals[i] += times * value
    listed = [
        Collective(*key, round(count), round(size), sent)
        for key, (count, size, sent) in found.items()
    ]
    return sorted(listed, key=lambda c: -c.sent)


def _kind(inside: Computation, instruction: Instruction) -> str:
    """Return the kind of the collective that starts here; "" for other instructions."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return ""
    parts = inside.instructions.values()
    # TPU matrix products may contain steps of a collective that starts elsewhere.
    if "chain_id=" in instruction.attributes and not _starts_here(inside):
        return ""
    # On TPU a reduce-scatter is a fusion of an all-reduce and a slice.
    if kind == "all-reduce" and any("slice" in part.opcode for part in parts):
        named = "scatter" in inside.name or "reduce_scatter" in inside.name
        return "reduce-scatter" if named else kind
    return kind


def _starts_here(inside: Computation) -> bool:
    return any(part.target == "AsyncCollectiveStart" for part in inside.instructions.values())


def _is_asynchronous(
    around: Computation, inside: Computation, outer: Instruction, part: Instruction
) -> bool:
    if '"is_sync":true' in part.attributes:
        return False
    if part is outer and part.opcode.endswith("-start") and not _is_covered(around, part):
        return False
    return part.opcode.endswith("-start") or _starts_here(inside) or "async" in around.name


def _is_covered(around: Computation, start: Instruction) -> bool:
    """Return whether the schedule has work between the start and end of a collective."""
    names = list(around.instructions)
    first = names.index(start.name) + 1
    ends = {user.name for user in around.users(start.name) if user.opcode.endswith("-done")}
    for name in names[first:]:
        if name in ends:
            return False
        if around.instructions[name].opcode in WORK:
            return True
    return True


def _size(inside: Computation, instruction: Instruction) -> int:
    """Return the bytes of the full array, in any memory space."""
    operands = [s for o in inside.operands(instruction) for s in o.shapes]
    if instruction.opcode in ("all-gather", "all-gather-start", "collective-broadcast"):
        n = len(operands) if instruction.opcode.endswith("-start") else 0
        return _bytes(instruction.shapes[n : 2 * n] if n else instruction.shapes)
    return _bytes(operands)


def _bytes(shapes: Sequence[Shape]) -> int:
    return sum(shape.bytes for shape in shapes)


def _sent_fraction(kind: str, n: int) -> float:
    if kind in ("collective-permute", "collective-broadcast"):
        return 1.0
    return (2 if kind == "all-reduce" else 1) * (n - 1) / n


def _route(instruction: Instruction, mesh: Mesh) -> Route:
    if instruction.opcode.startswith("collective-permute"):
        found = re.search(r"source_target_pairs=\{\{(.*?)\}\}", instruction.attributes)
        pairs = (
            [tuple(map(int, p.split(","))) for p in found.group(1).split("},{")] if found else []
        )
        moving = [pair for pair in pairs if pair[0] != pair[1]]
        varying = {axis for pair in moving for axis in _varying(pair, mesh)}
        return Route(_label(varying, mesh), _devices(moving[0] if moving else (), mesh))
    group = replica_groups(instruction.attributes, mesh.size)[0]
    return Route(_label(_varying(group, mesh), mesh), _devices(group, mesh))


def _varying(group: Sequence[int], mesh: Mesh) -> set[str]:
    places = np.array(np.unravel_index(list(group), mesh.devices.shape))
    return {name for name, along in zip(mesh.axis_names, places, strict=True) if np.ptp(along)}


def _label(axes: set[str], mesh: Mesh) -> str:
    return ",".join(name for name in mesh.axis_names if name in axes)


def _devices(group: Sequence[int], mesh: Mesh) -> tuple[Any, ...]:
    flat = mesh.devices.flatten()
    return tuple(flat[number] for number in group)


def replica_groups(attributes: str, n_devices: int) -> np.ndarray:
    """Parse the groups of an instruction, [groups, devices per group], in any XLA notation.

    {{0,1},{2,3}} lists the groups. [2,2]<=[2,2]T(1,0) reshapes and transposes 0 … n-1.
    mesh['a'=2,'b'=2] {'b'} names axes of an XLA mesh; 'a':(2)4 is the part of axis 'a' of size 4
    that follows a part of size 2.
    """
    text = re.search(r"replica_groups=(.*?)(?:, (?!device_ids)[a-z_]+=|$)", attributes, re.S)
    given = text.group(1) if text else "{}"
    if given.startswith("mesh"):
        return _groups_of_mesh(given)
    if given.startswith("["):
        shape, order = given.split("<=")
        return _iota(order).reshape(_ints(shape))
    rows = [_ints(row) for row in re.findall(r"\{([\d,]+)\}", given)]
    return np.array(rows or [list(range(n_devices))])


def _groups_of_mesh(text: str) -> np.ndarray:
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", text)}
    order = re.search(r"device_ids=\((.*?\)?)\)", text)
    ids = np.arange(int(np.prod([*sizes.values()])))
    if order:
        ids = _iota(order.group(1)) if "[" in order.group(1) else np.array(_ints(order.group(1)))
    chosen = text[text.rindex("{") :]
    shape: list[int] = []
    within: list[int] = []
    for name, size in sizes.items():
        # The axis is split into (before, part, after); a group runs over the part.
        part = re.search(rf"'{name}'(?::\((\d+)\)(\d+))?", chosen)
        before, width = (
            (1, 1) if not part else (int(part.group(1) or 1), int(part.group(2) or size))
        )
        within.append(len(shape) + 1)
        shape += [before, width, size // before // width]
    grid = ids.reshape(shape)
    outside = [axis for axis in range(grid.ndim) if axis not in within]
    return grid.transpose(*outside, *within).reshape(-1, int(np.prod([shape[i] for i in within])))


def _iota(text: str) -> np.ndarray:
    """Return 0 … n-1 reshaped and transposed, as given by [4,2]T(1,0)."""
    shape, _, transposed = text.partition("T")
    grid = np.arange(int(np.prod(_ints(shape)))).reshape(_ints(shape))
    return grid.transpose(_ints(transposed)).flatten() if transposed else grid.flatten()


def _ints(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
