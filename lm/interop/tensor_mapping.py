"""How a tensor of theirs and parameters of ours correspond: a line of a table, and both ways of it.

A form writes an array's dimensions as letters: "(H K) D" is a matrix whose rows are heads times
head dimensions. Both forms of a row have the same letters, so that reshaping and transposing
follow. A number is a dimension of that size; P counts parameters that share a tensor of theirs.
Their names have "{}" for the number of a layer, and of an expert in it; ours are stacked on as many
first dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from lm.interop.tensor_files import Stored

Shape = tuple[int, ...]
Block = tuple[Shape, np.ndarray]  # where it starts in our parameter, and its values

BLOCK_BYTES = 16_000_000  # read at once


@dataclass(frozen=True)
class TensorMapping:
    """Their tensor `name`, in the form `theirs`, holds our `paths`, each in the form `ours`.

    Without forms both are the same array.
    """

    name: str
    paths: tuple[str, ...]
    theirs: str = ""
    ours: str = ""

    @property
    def depth(self) -> int:
        """How many first dimensions of ours are numbers in their names."""
        return self.name.count("{}")


def same(name: str, path: str) -> TensorMapping:
    """A tensor that both have alike."""
    return TensorMapping(name, (path,))


def linear(name: str, path: str, n_in: str = "I", n_out: str = "O") -> list[TensorMapping]:
    """PyTorch's linear layer, [out, in], and its bias; ours is [in, out]."""
    return [
        TensorMapping(
            f"{name}.weight", (f"{path}/kernel",), f"({n_out}) ({n_in})", f"{n_in} {n_out}"
        ),
        TensorMapping(f"{name}.bias", (f"{path}/bias",), f"({n_out})", n_out),
    ]


def norm(name: str, path: str) -> list[TensorMapping]:
    """A normalisation's scale and, if it has one, its bias."""
    return [same(f"{name}.weight", f"{path}/scale"), same(f"{name}.bias", f"{path}/bias")]


def output(name: str) -> TensorMapping:
    """The output projection, where it is not the table of tokens."""
    return TensorMapping(name, ("head/kernel",), "V D", "D V")


# --- forms


def _axes(form: str) -> list[list[str]]:
    axes: list[list[str]] = []
    inside = False
    for word in form.replace("(", " ( ").replace(")", " ) ").split():
        if word in "()":
            inside = word == "("
            axes += [[]] if inside else []
        elif inside:
            axes[-1].append(word)
        else:
            axes.append([word])
    return axes


@dataclass(frozen=True)
class Forms:
    """A row with the sizes of its letters, which the shape of our parameter gives."""

    theirs: list[list[str]]
    ours: list[list[str]]
    sizes: dict[str, int]

    @classmethod
    def of(cls, row: TensorMapping, shape: Shape) -> Forms:
        """`shape` is that of a single layer."""
        letters = [[chr(ord("a") + i)] for i in range(len(shape))]
        theirs, ours = (_axes(form) if form else letters for form in (row.theirs, row.ours))
        sizes = {"P": len(row.paths)}
        for axis, size in zip(ours, shape, strict=True):
            sizes |= {letter: int(letter) for letter in axis if letter.isdigit()}
            known = prod(sizes[letter] for letter in axis if letter.isdigit())
            sizes |= {letter: size // known for letter in axis if not letter.isdigit()}
        return cls(theirs, ours, sizes)

    def size(self, letters: Sequence[str]) -> int:
        return prod(self.sizes[letter] for letter in letters)

    @property
    def their_shape(self) -> Shape:
        return tuple(self.size(axis) for axis in self.theirs)

    def read(self, stored: Stored, part: int) -> Iterator[Block]:
        """Parameter number `part` of the row's, in blocks of about `BLOCK_BYTES`."""
        (first, *rest), *others = self.theirs
        start, inner = 0, self.size(rest)
        if first == "P":
            start = part * inner
            first, *rest = rest
            inner = self.size(rest)
        letters = [first, *rest, *(letter for axis in others for letter in axis)]
        unit = 4 * inner * self.size([letter for axis in others for letter in axis])
        step = max(1, BLOCK_BYTES // unit)
        for begin in range(0, self.sizes[first], step):
            end = min(begin + step, self.sizes[first])
            x = stored.rows(start + begin * inner, start + end * inner)
            sizes = self.sizes | {first: end - begin}
            x = x.reshape([sizes[letter] for letter in letters])
            if "P" in letters:
                x = x.take(part, letters.index("P"))
            places = [letter for letter in letters if letter != "P"]
            order = [letter for axis in self.ours for letter in axis]
            x = x.transpose([places.index(letter) for letter in order])
            x = x.reshape([prod(sizes[letter] for letter in axis) for axis in self.ours])
            starts = [begin * self.size(axis[1:]) * (first in axis) for axis in self.ours]
            yield tuple(starts), x

    def write(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Their tensor of our parameters."""
        order = [letter for axis in self.ours for letter in axis]
        wide = [part.reshape([self.sizes[letter] for letter in order]) for part in parts]
        letters = [letter for axis in self.theirs for letter in axis]
        x = np.stack(wide) if "P" in letters else wide[0]
        order = ["P", *order] if "P" in letters else order
        return x.transpose([order.index(letter) for letter in letters]).reshape(self.their_shape)


def names(row: TensorMapping, shape: Shape) -> list[str]:
    """The names of a row's tensors, one a layer, or one an expert of a layer."""
    return [row.name.format(*numbers) for numbers in np.ndindex(*shape[: row.depth])]


def their_shape(row: TensorMapping, shape: Shape) -> Shape:
    """The shape of each of a row's tensors; `shape` is that of our parameter."""
    return Forms.of(row, shape[row.depth :]).their_shape


def read(
    row: TensorMapping, part: int, shape: Shape, find: Callable[[str], Stored]
) -> Iterator[Block]:
    """Our parameter number `part` of a row, block by block, layer by layer."""
    forms = Forms.of(row, shape[row.depth :])
    for numbers in np.ndindex(*shape[: row.depth]):
        for starts, x in forms.read(find(row.name.format(*numbers)), part):
            yield (*numbers, *starts), x.reshape([1] * row.depth + list(x.shape))


def write(row: TensorMapping, number: int, shape: Shape, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Tensor `number` in `names` of a row, of the row's parameters as wholes."""
    forms = Forms.of(row, shape[row.depth :])
    at = tuple(int(i) for i in np.unravel_index(number, shape[: row.depth])) if row.depth else ()
    return forms.write([np.asarray(part[at] if at else part) for part in parts])
