"""Tensor mapping: a table row relating a Hugging Face tensor to parameters, both ways.

A layout writes the dimensions of an array as letters: "(H K) D" is a matrix whose rows are heads
times head dimensions. Both layouts of a row have the same letters, which determine reshape and
transpose. A number is a dimension of that size, and a 1 may be missing in the second; P counts the
parameters that are stored in one tensor. Tensor names have "{}" for the layer number, and for the
expert within it; parameters are stacked on the same number of leading axes. A stack of layers that
differ has several parameters for a tensor name, each for some of the layers (`of_segments`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from lm.interop.tensor_files import StoredTensor
from lm.models.transformer_config import Segment

Shape = tuple[int, ...]
Block = tuple[Shape, np.ndarray]  # start indices in the parameter, and values

BLOCK_BYTES = 16_000_000  # bytes read at once


@dataclass(frozen=True)
class TensorMapping:
    """Mapping of one Hugging Face tensor to parameters.

    Attributes:
        name: name of the tensor; "{}" stands for the layer, a second one for the expert.
        paths: parameters stored in the tensor.
        hf_layout: layout of the tensor; "" if it equals the parameter's.
        lm_layout: layout of each parameter, without the stacked leading axes.
        layers: numbers of the stacked layers; (): 0, 1, ….
    """

    name: str
    paths: tuple[str, ...]
    hf_layout: str = ""
    lm_layout: str = ""
    layers: Sequence[int] = ()

    @property
    def n_stacked_axes(self) -> int:
        """Number of leading axes that are unstacked into tensor names."""
        return self.name.count("{}")

    def tensor_name(self, index: Sequence[int]) -> str:
        """Return the name of the tensor at an index of the stacked axes."""
        if not self.layers or not index:
            return self.name.format(*index)
        return self.name.format(self.layers[index[0]], *index[1:])


def same_layout(name: str, path: str) -> TensorMapping:
    """Map a tensor with the same layout as the parameter."""
    return TensorMapping(name, (path,))


def linear_mappings(name: str, path: str, n_in: str = "I", n_out: str = "O") -> list[TensorMapping]:
    """Map a PyTorch linear layer, [out, in], and its bias to a kernel [in, out]."""
    return [
        TensorMapping(
            f"{name}.weight", (f"{path}/kernel",), f"({n_out}) ({n_in})", f"{n_in} {n_out}"
        ),
        TensorMapping(f"{name}.bias", (f"{path}/bias",), f"({n_out})", n_out),
    ]


def norm_mappings(name: str, path: str) -> list[TensorMapping]:
    """Map the scale and, if present, the bias of a normalization layer."""
    weight, bias = f"{name}.weight", f"{name}.bias"
    return [same_layout(weight, f"{path}/scale"), same_layout(bias, f"{path}/bias")]


def output_mapping(name: str) -> TensorMapping:
    """Map the output projection used with untied embeddings."""
    return TensorMapping(name, ("head/kernel",), "V D", "D V")


def of_segments(
    mappings: Iterable[TensorMapping], parts: Sequence[Segment], stack: str
) -> list[TensorMapping]:
    """Repeat a stack's layer rows for each parameter that holds some of the layers.

    Args:
        mappings: rows of the table, those of layers as if all were alike.
        parts: segments of the stack.
        stack: path of the stack; rows of other paths are unchanged.
    """
    layers, found = f"{stack}/layers/", []
    for mapping in mappings:
        if not mapping.paths[0].startswith(layers):
            found.append(mapping)
            continue
        for part in parts:
            n = len(part.period)
            for i in range(n):
                module = f"{stack}/{part.name}/" + (f"{i}_of_{n}/" if n > 1 else "")
                paths = tuple(module + path.removeprefix(layers) for path in mapping.paths)
                numbers = range(part.first + i, part.first + part.n_layers, n)
                found.append(replace(mapping, paths=paths, layers=numbers))
    return found


# --- layouts


def _axes(layout: str) -> list[list[str]]:
    """Parse a layout into the letters of each axis."""
    axes: list[list[str]] = []
    inside = False
    for word in layout.replace("(", " ( ").replace(")", " ) ").split():
        if word in "()":
            inside = word == "("
            axes += [[]] if inside else []
        elif inside:
            axes[-1].append(word)
        else:
            axes.append([word])
    return axes


@dataclass(frozen=True)
class _Layouts:
    """Both layouts of a mapping, with the size of each letter."""

    hf: list[list[str]]
    lm: list[list[str]]
    sizes: dict[str, int]

    @classmethod
    def of(cls, mapping: TensorMapping, shape: Shape) -> _Layouts:
        """Infer the sizes from the shape of a single layer's parameter."""
        letters = [[chr(ord("a") + i)] for i in range(len(shape))]
        layouts = mapping.hf_layout, mapping.lm_layout
        hf, lm = (_axes(layout) if layout else letters for layout in layouts)
        sizes = {"P": len(mapping.paths), "1": 1}
        for axis, size in zip(lm, shape, strict=True):
            sizes |= {letter: int(letter) for letter in axis if letter.isdigit()}
            known = prod(sizes[letter] for letter in axis if letter.isdigit())
            sizes |= {letter: size // known for letter in axis if not letter.isdigit()}
        return cls(hf, lm, sizes)

    def size(self, letters: Sequence[str]) -> int:
        return prod(self.sizes[letter] for letter in letters)

    @property
    def hf_shape(self) -> Shape:
        return tuple(self.size(axis) for axis in self.hf)

    def read(self, stored: StoredTensor, part: int) -> Iterator[Block]:
        """Yield parameter number `part` of the tensor in blocks of about `BLOCK_BYTES`."""
        (first, *rest), *others = self.hf
        start, inner = 0, self.size(rest)
        if first == "P":
            start = part * inner
            first, *rest = rest
            inner = self.size(rest)
        letters = [first, *rest, *(letter for axis in others for letter in axis if letter != "1")]
        unit = 4 * inner * self.size([letter for axis in others for letter in axis])
        step = max(1, BLOCK_BYTES // unit)
        for begin in range(0, self.sizes[first], step):
            end = min(begin + step, self.sizes[first])
            x = stored.rows(start + begin * inner, start + end * inner)
            sizes = self.sizes | {first: end - begin}
            x = x.reshape([sizes[letter] for letter in letters])
            if "P" in letters:
                x = x.take(part, letters.index("P"))
            remaining = [letter for letter in letters if letter != "P"]
            order = [letter for axis in self.lm for letter in axis]
            x = x.transpose([remaining.index(letter) for letter in order])
            x = x.reshape([prod(sizes[letter] for letter in axis) for axis in self.lm])
            starts = [begin * self.size(axis[1:]) * (first in axis) for axis in self.lm]
            yield tuple(starts), x

    def write(self, params: Sequence[np.ndarray]) -> np.ndarray:
        """Return the tensor that contains these parameters."""
        order = [letter for axis in self.lm for letter in axis]
        split = [param.reshape([self.sizes[letter] for letter in order]) for param in params]
        letters = [letter for axis in self.hf for letter in axis if letter != "1"]
        x = np.stack(split) if "P" in letters else split[0]
        order = ["P", *order] if "P" in letters else order
        return x.transpose([order.index(letter) for letter in letters]).reshape(self.hf_shape)


def tensor_names(mapping: TensorMapping, shape: Shape) -> list[str]:
    """Return the names of a mapping's tensors: one per layer, or per expert of a layer.

    Args:
        mapping: row of the table.
        shape: shape of the parameter, stacked axes included.
    """
    return [mapping.tensor_name(i) for i in np.ndindex(*shape[: mapping.n_stacked_axes])]


def hf_shape(mapping: TensorMapping, shape: Shape) -> Shape:
    """Return the shape of each of a mapping's tensors; `shape` is the parameter's."""
    return _Layouts.of(mapping, shape[mapping.n_stacked_axes :]).hf_shape


def read_parameter(
    mapping: TensorMapping, part: int, shape: Shape, find: Callable[[str], StoredTensor]
) -> Iterator[Block]:
    """Yield a parameter block by block, layer by layer.

    Args:
        mapping: row of the table.
        part: index of the parameter in `mapping.paths`.
        shape: shape of the parameter, stacked axes included.
        find: returns the stored tensor with a name.
    """
    n = mapping.n_stacked_axes
    layouts = _Layouts.of(mapping, shape[n:])
    for numbers in np.ndindex(*shape[:n]):
        for starts, x in layouts.read(find(mapping.tensor_name(numbers)), part):
            yield (*numbers, *starts), x.reshape([1] * n + list(x.shape))


def make_tensor(
    mapping: TensorMapping, number: int, shape: Shape, params: Sequence[np.ndarray]
) -> np.ndarray:
    """Make tensor `number` of `tensor_names` from the mapping's unsharded parameters."""
    n = mapping.n_stacked_axes
    layouts = _Layouts.of(mapping, shape[n:])
    at = tuple(int(i) for i in np.unravel_index(number, shape[:n])) if n else ()
    return layouts.write([np.asarray(param[at] if at else param) for param in params])
