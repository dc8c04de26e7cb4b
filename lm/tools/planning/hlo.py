"""Parser of XLA's HLO text: computations, instructions, and how often each instruction runs.

XLA's cost analysis counts the body of a loop once; `Module.executions` uses the loop's trip count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

ITEM_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}
SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ")
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
FREE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
)


class UnknownTripCount(ValueError):
    """Error for a loop whose trip count the text does not give."""


@dataclass(frozen=True)
class Shape:
    """Array type of a result; `space` is its memory space, 0 for main memory."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @cached_property
    def bytes(self) -> int:
        """Size in bytes."""
        digits = re.search(r"\d+", self.dtype)
        bits = ITEM_BITS.get(self.dtype) or int(digits.group() if digits else 0)
        return prod(self.dims) * bits // 8


@dataclass(frozen=True)
class Instruction:
    """Line `name = shapes opcode(operands), attributes`; a tuple is a flat list of shapes."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool
    arguments: str = ""

    @cached_property
    def op_name(self) -> str:
        """Name of the model operation that the instruction comes from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    def called(self, key: str) -> list[str]:
        """Return the computations in an attribute such as calls, body or condition."""
        found = re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return re.findall(r"[\w.\-]+", found.group(1)) if found else []

    @cached_property
    def branches(self) -> list[str]:
        """Branches of a conditional; the one for a false predicate comes first."""
        of_predicate = self.called("false_computation") + self.called("true_computation")
        return self.called("branch_computations") or of_predicate

    @cached_property
    def target(self) -> str:
        """Target of a custom call."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found.group(1) if found else ""


@dataclass
class Computation:
    """Instructions by name, in schedule order."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @cached_property
    def root(self) -> Instruction:
        """Instruction that gives the result of the computation."""
        return next(i for i in self.instructions.values() if i.is_root)

    @cached_property
    def parameters(self) -> list[Instruction]:
        """Parameters in the order of their numbers."""
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(i.arguments))

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """Return the instructions whose results are operands of an instruction."""
        return [self.instructions[name] for name in instruction.operands]

    def users(self, name: str) -> list[Instruction]:
        """Return the instructions that read the result of `name`."""
        return self._users.get(name, [])

    @cached_property
    def _users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for operand in instruction.operands:
                users.setdefault(operand, []).append(instruction)
        return users


@dataclass(frozen=True)
class Module:
    """Program.

    Attributes:
        computations: Computations by name.
        entry: Name of the entry computation.
        taken: Fraction of runs in which a conditional takes its second branch (true predicate).
        unknown_trips: Trip count assumed for loops without a known one; None: raise an error.
    """

    computations: dict[str, Computation]
    entry: str
    taken: float = 0.5
    unknown_trips: int | None = None

    def executions(self) -> Iterator[tuple[Computation, Instruction, float]]:
        """Yield every instruction outside of fusions, with its computation and number of runs."""
        yield from self._executions(self.entry, 1.0)

    def _executions(
        self, name: str, times: float
    ) -> Iterator[tuple[Computation, Instruction, float]]:
        computation = self.computations[name]
        for instruction in computation.instructions.values():
            if instruction.opcode == "while":
                iterations = times * self.trip_count(computation, instruction)
                yield from self._executions(instruction.called("body")[0], iterations)
            elif instruction.opcode == "call":
                yield from self._executions(instruction.called("to_apply")[0], times)
            elif instruction.opcode == "async-start":
                yield from self._executions(instruction.called("calls")[0], times)
            elif instruction.opcode == "conditional":
                parts = (1 - self.taken, self.taken)
                for branch, part in zip(instruction.branches, parts, strict=True):
                    if part:
                        yield from self._executions(branch, times * part)
            else:
                yield computation, instruction, times

    def fused(self, instruction: Instruction) -> Computation | None:
        """Return the computation of a fusion; None for other instructions."""
        called = instruction.called("calls") if instruction.opcode == "fusion" else []
        return self.computations[called[0]] if called else None

    def inside(
        self, computation: Computation, instruction: Instruction
    ) -> Iterator[tuple[Computation, Instruction]]:
        """Yield an instruction with its computation, or those inside if it is a fusion."""
        fused = self.fused(instruction)
        if fused is None:
            yield computation, instruction
            return
        for part in fused.instructions.values():
            yield from self.inside(fused, part)

    def trip_count(self, computation: Computation, loop: Instruction) -> int:
        """Return the trip count of a `while`: XLA's, or from the comparison of its counter.

        Counters start at 0 and grow by 1, or by more if XLA has unrolled the body.

        Raises:
            UnknownTripCount: The condition does not compare with exactly one constant, and
                `unknown_trips` is None.
        """
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known.group(1))
        condition = self.computations[loop.called("condition")[0]]
        limits = [
            limit
            for instruction in condition.instructions.values()
            for limit in self._numbers(condition, instruction)
        ]
        if len(limits) != 1:
            if self.unknown_trips is not None:
                return self.unknown_trips
            raise UnknownTripCount(f"{loop.name} in {computation.name}")
        return -(-limits[0] // self._step(condition, self.computations[loop.called("body")[0]]))

    def _step(self, condition: Computation, body: Computation) -> int:
        """Return the increment of the counter, the state element that the condition reads."""
        read = [
            re.search(r"index=(\d+)", operand.attributes)
            for operand in condition.operands(condition.root)
        ]
        places = [int(found.group(1)) for found in read if found]
        if len(places) != 1:
            return 1
        counter = body.operands(body.root)[places[0]]
        added = [*self._numbers(body, counter)]
        for operand in body.operands(counter):
            added += self._numbers(body, operand)
        return added[0] if len(added) == 1 else 1

    def _numbers(self, computation: Computation, instruction: Instruction) -> Iterator[int]:
        """Yield the integer constants of an instruction, or inside a fusion."""
        for _, part in self.inside(computation, instruction):
            if part.opcode == "constant" and re.fullmatch(r"\d+", part.arguments):
                yield int(part.arguments)


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Parse a type; a tuple gives a flat list of arrays."""
    shapes = []
    for dtype, dims, layout in SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
        shapes.append(Shape(dtype, sizes, int(space.group(1)) if space else 0))
    return tuple(shapes)


def parse_hlo(text: str, taken: float = 0.5, unknown_trips: int | None = None) -> Module:
    """Parse the text of `compiled.as_text()`; for `taken` and `unknown_trips` see `Module`."""
    computations: dict[str, Computation] = {}
    current, entry = Computation(""), ""
    for line in text.splitlines():
        if header := COMPUTATION.match(line):
            current = computations[header.group(2)] = Computation(header.group(2))
            entry = header.group(2) if header.group(1) else entry
        elif found := INSTRUCTION.match(line):
            instruction = _instruction(line, found)
            current.instructions[instruction.name] = instruction
    return Module(computations, entry, taken, unknown_trips)


def _instruction(line: str, found: re.Match) -> Instruction:
    rest = line[found.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opening = rest.index("(", end)
    closing = _closing(rest, opening)
    arguments = rest[opening + 1 : closing]
    return Instruction(
        name=found.group(2),
        shapes=parse_shapes(rest[:end]),
        opcode=rest[end:opening].strip(),
        operands=tuple(re.findall(r"%([\w.\-]+)", arguments)),
        attributes=rest[closing + 1 :],
        is_root=bool(found.group(1)),
        arguments=arguments,
    )


def _closing(text: str, start: int) -> int:
    """Return the index of the bracket matching the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match.group() == "(" else -1
        if not depth:
            return match.start()
    raise ValueError(f"unbalanced brackets: {text[:200]}")
