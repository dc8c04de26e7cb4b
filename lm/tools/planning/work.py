"""FLOPs and main-memory traffic of a compiled program on one device.

FLOPs count matrix products and kernels, 2 per multiply–add; element-wise operations are excluded,
so that the number is comparable to model FLOPs. Traffic counts an array once for each instruction
that reads or writes it; slices and in-place updates count only the part that is touched.
"""

from __future__ import annotations

import re
from functools import lru_cache
from math import prod

from lm.tools.planning.hlo import FREE, Computation, Instruction, Module, Shape

VIEWS = ("bitcast", "copy", "reshape", "transpose", "convert")
NOTHING_MOVES = (*FREE, "copy-done", "opt-barrier", "add-dependency", "replica-id", "iota")


def flops(module: Module) -> float:
    """Return the FLOPs of the whole program."""
    return sum(flops_by_dtype(module).values())


def flops_by_dtype(module: Module) -> dict[str, float]:
    """Return the FLOPs of the whole program by multiplied dtype; "" for kernels."""
    found: dict[str, float] = {}
    for around, instruction, times in module.executions():
        for computation, part in module.inside(around, instruction):
            if n := _flops(computation, part):
                is_kernel = part.opcode == "custom-call" and not part.target.startswith("__cublas")
                dtype = "" if is_kernel else computation.operands(part)[0].shapes[0].dtype
                found[dtype] = found.get(dtype, 0.0) + times * n
    return found


def memory_traffic(module: Module) -> float:
    """Return the bytes that the program reads from and writes to main memory."""
    return sum(
        times * _traffic(module, computation, instruction)
        for computation, instruction, times in module.executions()
    )


def _flops(computation: Computation, instruction: Instruction) -> int:
    if instruction.opcode == "dot":
        return _dot(computation, instruction)
    if instruction.opcode == "convolution":
        return _convolution(computation, instruction)
    if instruction.opcode == "custom-call":
        return _kernel(computation, instruction)
    return 0


def _dot(computation: Computation, dot: Instruction) -> int:
    left = computation.operands(dot)[0].shapes[0]
    contracted = _numbers(dot.attributes, r"lhs_contracting_dims=\{([\d,]*)\}")
    return 2 * prod(dot.shapes[0].dims) * prod(left.dims[i] for i in contracted)


def _convolution(computation: Computation, convolution: Instruction) -> int:
    """Return the FLOPs of a convolution; on TPUs, matrix products are convolutions too.

    A batched product is a convolution over a batch dimension whose window covers a single element.
    So pairs of overlapping input and kernel elements are counted, not the window.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    assert labels
    left, right, out = labels.groups()
    inputs, kernel = (operand.shapes[0].dims for operand in computation.operands(convolution))
    result = convolution.shapes[0].dims
    batch, features = result[out.index("b")], result[out.index("f")]
    pairs = 1
    window = _window(convolution.attributes)
    for axis in range(len(out) - 2):
        sizes = (inputs[left.index(str(axis))], kernel[right.index(str(axis))])
        pairs *= _meeting(*sizes, result[out.index(str(axis))], *window[axis])
    groups = _numbers(convolution.attributes, r"batch_group_count=(\d+)") or (1,)
    return 2 * batch * features * kernel[right.index("i")] * pairs // groups[0]


def _window(attributes: str) -> list[tuple[int, int, int, int]]:
    """Parse stride, low padding, input dilation and kernel dilation of each dimension."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    given = dict(part.split("=") for part in found.group(1).split()) if found else {}
    n = len(given.get("size", "").split("x")) if given else 0

    def along(key: str, default: str) -> list[int]:
        return [int(part.split("_")[0]) for part in given.get(key, default).split("x")]

    ones = "x".join("1" * n)
    return list(
        zip(
            along("stride", ones),
            along("pad", "x".join(["0_0"] * n)),
            along("lhs_dilate", ones),
            along("rhs_dilate", ones),
            strict=True,
        )
        if n
        else ()
    )


@lru_cache
def _meeting(
    n_input: int, n_kernel: int, n_out: int, stride: int, pad: int, dilate: int, kernel_dilate: int
) -> int:
    """Count pairs of output and kernel positions that hit an element of the input."""
    span = (n_input - 1) * dilate + 1
    positions = (
        o * stride + k * kernel_dilate - pad for o in range(n_out) for k in range(n_kernel)
    )
    return sum(0 <= position < span and position % dilate == 0 for position in positions)


def _cost(call: Instruction) -> tuple[int, int] | None:
    """Return FLOPs and bytes that a kernel encodes in its operation name (`megablox.py`)."""
    found = re.search(r"cost_flops_(\d+)_bytes_(\d+)/.*pallas_call$", call.op_name)
    return (int(found.group(1)), int(found.group(2))) if found else None


def _kernel(computation: Computation, call: Instruction) -> int:
    """Return the FLOPs of a custom call: cuBLAS, a stated cost or estimate, or attention."""
    if cost := _cost(call):
        return cost[0]
    if call.target.startswith("__cublas"):
        return _matrix_library(computation, call)
    if stated := _stated(call, "flops"):
        return stated
    if is_attention(call):
        return _attention(computation, call)
    return 0


def _stated(call: Instruction, what: str) -> int:
    """Return a value of a kernel's own cost estimate, or 0."""
    found = re.search(rf'"?cost_estimate"?:\s*\{{[^}}]*"?{what}"?:\s*"?(\d+)', call.attributes)
    return int(found.group(1)) if found else 0


def _matrix_library(computation: Computation, call: Instruction) -> int:
    found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', call.attributes)
    left = computation.operands(call)[0].shapes[0]
    contracted = re.findall(r"\d+", found.group(1)) if found else []
    return 2 * prod(call.shapes[0].dims) * prod(left.dims[int(i)] for i in contracted)


def is_attention(call: Instruction) -> bool:
    """Return whether a custom call is a fused attention kernel."""
    names = call.target + call.name
    return bool(re.search(r"fmha|splash|flash|attention", names) or _stated_pairs(call))


def _stated_pairs(call: Instruction) -> int | None:
    """Return the number of query–key pairs per row and head, if the model's scope states it."""
    found = re.search(r"attention_pairs_(\d+)", call.op_name)
    is_kernel = re.search("fmha|mosaic_gpu|triton", call.target)
    return int(found.group(1)) if found and is_kernel else None


def _attention(computation: Computation, call: Instruction) -> int:
    """Return the FLOPs of a fused attention kernel.

    Queries and keys are [B, H, L, K] or [B, L, H, K]; without B for a single row. The forward pass
    has two products, the backward pass five: the scores again and four gradients. Splash and Pallas
    GPU kernels compute the scores and the weight gradient in each of two backward kernels (dq: 3
    products, dkv: 4), unless a single splash kernel computes all gradients (dkv; its query gradient
    has a part per key block).
    """
    name = call.target + call.name
    operands = [operand.shapes[0] for operand in computation.operands(call)]
    first = next(i for i, shape in enumerate(operands) if "f" in shape.dtype)
    queries, keys = operands[first].dims, operands[first + 1].dims
    # Assume that the longer of these dimensions is the sequence.
    sequence = -2 if queries[-2] >= queries[-3] else -3
    length, n_keys = queries[sequence], keys[sequence]
    products, n_pairs = 2, length * n_keys // 2
    stated = _stated_pairs(call)
    if stated and "fmha" not in name:
        products = _products_of_pallas(call, operands)
        n_pairs = _pairs_of_pallas(call, stated, products, length * n_keys)
        return 2 * products * prod(queries) // length * n_pairs
    if "dkv" in name:
        products = 5 if any(len(s.dims) > len(queries) for s in call.shapes) else 4
    elif "dq" in name:
        products = 3
    elif "ackward" in name or "bwd" in name:
        products = 5
    if "splash" in name:
        n_pairs = _splash_pairs(name, operands, length, n_keys)
    elif stated:
        n_pairs = stated
    elif masked := re.search(r'"mask_type":"(\w+)"', call.attributes):
        n_pairs = length * n_keys // (2 if "CAUSAL" in masked.group(1) else 1)
    return 2 * products * prod(queries) // length * n_pairs


def _products_of_pallas(call: Instruction, operands: list[Shape]) -> int:
    """Return the number of products of a Pallas GPU kernel; it takes q, k, v, and backward more."""
    if sum("f" in shape.dtype for shape in operands) == 3:
        return 2
    return {1: 3, 2: 4}.get(len(call.shapes), 5)


def _pairs_of_pallas(call: Instruction, stated: int, products: int, n_pairs: int) -> int:
    """Return the number of pairs that a kernel computes, given those in the mask.

    In the backward pass, Tokamax 0.0.12 skips only tiles masked by causality on Hopper; on
    Blackwell, where one kernel has all five products, none.
    """
    if "mosaic" not in call.target or products == 2 or stated == n_pairs:
        return stated
    return n_pairs if products == 5 else n_pairs // 2


def _splash_pairs(name: str, operands: list[Shape], length: int, n_keys: int) -> int:
    """Return the number of query–key pairs that a splash kernel computes.

    All pairs count if the kernel gets no query positions besides the segment ids. Otherwise the
    first operand lists tiles, [heads, query blocks, key blocks]; the dkv kernel shrinks the query
    dimension, the others the key dimension, to the maximum number of tiles per block. A causal mask
    counts half of the pairs, a narrower mask its tiles.
    """
    wholes = sum(shape.dtype == "s32" for shape in operands)
    if wholes == (2 if "segmented" in name else 0):
        return length * n_keys
    _, rows, columns = operands[0].dims
    block = n_keys // columns if "dkv" in name else length // rows
    return min(rows * columns * block**2, length * n_keys // 2)


def _traffic(module: Module, computation: Computation, instruction: Instruction) -> int:
    opcode, results = instruction.opcode, instruction.shapes
    if opcode in NOTHING_MOVES or opcode.endswith(("-done", "-update")):
        return 0
    if instruction.target == "AllocateBuffer":
        return 0
    if opcode == "custom-call" and (cost := _cost(instruction)):
        return cost[1]
    operands = [shape for operand in computation.operands(instruction) for shape in operand.shapes]
    if opcode == "fusion":
        return _fusion_traffic(module, computation, instruction)
    if opcode in ("slice-start", "dynamic-slice-start"):
        return _bytes(results[len(operands) :]) * 2
    if opcode.endswith("-start") and opcode != "all-reduce-start":
        return _bytes(results)
    if opcode in ("slice", "dynamic-slice", "gather"):
        return 2 * _bytes(results)
    if opcode == "dynamic-update-slice":
        return 2 * _bytes(computation.operands(instruction)[1].shapes)
    if opcode == "scatter":
        return 3 * _bytes(computation.operands(instruction)[-1].shapes)
    # A kernel may read an operand several times, tile by tile.
    return max(_bytes(operands) + _bytes(results), _stated(instruction, "bytes_accessed"))


def _fusion_traffic(module: Module, computation: Computation, fusion: Instruction) -> int:
    inside = module.fused(fusion)
    assert inside is not None
    passed = _passed_through(fusion)
    total = 0
    for number, operand in enumerate(computation.operands(fusion)):
        if number not in passed.values():
            total += min(_bytes(operand.shapes), _read(module, inside, number))
    return total + _written(module, inside, inside.root, fusion.shapes, frozenset(passed))


def _passed_through(fusion: Instruction) -> dict[int, int]:
    """Return results, with operands, that a collective step only passes through."""
    if "async" not in fusion.name and "async_collective" not in fusion.attributes:
        return {}
    aliases = re.search(r"output_to_operand_aliasing=\{(.*?)\}\s*,?\s*calls", fusion.attributes)
    pairs = re.findall(r"\{(\d*)\}: \((\d+), \{", aliases.group(1)) if aliases else []
    return {int(result or 0): int(operand) for result, operand in pairs}


def _read(module: Module, inside: Computation, number: int) -> int:
    """Return the bytes that a fusion reads of a parameter: all, or only the slices it takes.

    Slices may be in a nested fusion.
    """
    read, total = [inside.parameters[number]], 0
    for array in read:
        for user in inside.users(array.name):
            if user.opcode in ("dynamic-slice", "slice", "gather"):
                space = array.shapes[0].space
                total += sum(Shape(s.dtype, s.dims, space).bytes for s in user.shapes if not space)
            elif user.opcode == "bitcast":
                read.append(user)
            elif nested := module.fused(user):
                places = (i for i, operand in enumerate(user.operands) if operand == array.name)
                total += sum(_read(module, nested, i) for i in places)
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != array.name:
                return _bytes(array.shapes)
    return total


def _written(
    module: Module,
    inside: Computation,
    root: Instruction,
    results: tuple[Shape, ...],
    passed: frozenset[int] = frozenset(),
) -> int:
    """Return the bytes that a fusion writes: its results, or the update of an in-place update.

    Results in `passed` are only passed through.
    """
    while root.opcode == "bitcast":
        root = inside.operands(root)[0]
    if nested := module.fused(root):
        return _written(module, nested, nested.root, results, passed)
    if root.opcode == "tuple" and len(root.operands) == len(results):
        parts = enumerate(zip(inside.operands(root), results, strict=True))
        shown = ((part, out) for i, (part, out) in parts if i not in passed)
        return sum(_written(module, inside, part, (out,)) for part, out in shown)
    if root.opcode == "dynamic-update-slice" and not results[0].space:
        return inside.operands(root)[1].shapes[0].bytes
    return _bytes([result for i, result in enumerate(results) if i not in passed])


def _bytes(shapes: tuple[Shape, ...] | list[Shape]) -> int:
    return sum(shape.bytes for shape in shapes if shape.space == 0)


def _numbers(text: str, pattern: str) -> tuple[int, ...]:
    found = re.search(pattern, text)
    return tuple(int(n) for n in found.group(1).split(",") if n) if found else ()


def attention_kernel(module: Module) -> str:
    """Return the attention kernel of a program: "splash", "cudnn" …, or "xla"."""
    for _, call, _ in module.executions():
        if call.opcode == "custom-call" and is_attention(call):
            name = call.target + call.name
            known = {"fmha": "cudnn", "splash": "splash", "mosaic": "tokamax", "triton": "triton"}
            return next((kernel for part, kernel in known.items() if part in name), "flash")
    return "xla"
