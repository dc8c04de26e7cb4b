"""Models of Hugging Face's `transformers`: from their folders to our models and back.

model, params = load("folder")  # config.json and safetensors
logits_BLV = model.apply({"params": params}, tokens_BL)
save(model, params, "other_folder")
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from jax.sharding import Mesh

from lm.errors import UserError
from lm.interop import bert, gpt2, llama, llama2c, mapping, t5
from lm.interop.family import Family, Values
from lm.interop.mapping import Row
from lm.interop.parameters import Parameter, parameters
from lm.interop.placement import place
from lm.interop.tensor_files import FLOATS, Made, Stored, read_folder, write_folder
from lm.models.config import TransformerConfig
from lm.models.registry import FAMILIES as MODELS
from lm.optim.parameter_groups import flat, nested

Params = Any

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        gpt2.GPT2,
        bert.BERT,
        bert.ROBERTA,
        t5.T5,
        llama.LLAMA,
        llama.MISTRAL,
        llama.QWEN2,
        llama.QWEN3,
    )
}


def load(path: str | Path, mesh: Mesh | None = None) -> tuple[nn.Module, Params]:
    """The model and parameters in a folder of `transformers`, or in a .bin file of llama2.c.

    Parameters are float32 and lie as in training on `mesh`, or on the first device. UserError for
    what is unknown, missing, too much, of the wrong shape or truncated.
    """
    found = open_checkpoint(Path(path))
    return found.model, found.params(mesh)


def save(
    model: nn.Module,
    params: Params,
    path: str | Path,
    *,
    dtype: str = "float32",
    about: Mapping[str, Any] | None = None,
) -> str:
    """Write a folder that `transformers` loads; the name of its class.

    `dtype` is float32, bfloat16 or float16; `about` goes into config.json. UserError if no
    architecture of theirs computes what the model does.
    """
    leaves = flat(nn.meta.unbox(params))
    config: TransformerConfig = model.config  # type: ignore[attr-defined]
    family, heads = _family_of(model, leaves)
    shapes = parameters(family, model, heads)
    _check_parameters(leaves, shapes)
    name = family.classes[heads]
    bare = family.prefix if name.lower() == f"{family.model_type}model" else ""
    made = [
        Made(
            theirs.removeprefix(bare),
            mapping.their_shape(row, shapes[row.paths[0]].shape),
            partial(_written, row, layer, shapes[row.paths[0]].shape, leaves),
        )
        for row in _rows(family, config, shapes)
        for layer, theirs in enumerate(mapping.names(row, shapes[row.paths[0]].shape))
    ]
    if not config.tie_embeddings and family.heads:
        originals = {tensor.name: tensor for tensor in made}
        made += [
            replace(originals[of], name=copy)
            for copy, of in family.copies.items()
            if of in originals
        ]
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_folder(folder, made, dtype)
    values = family.theirs(config) | {"architectures": [name], "dtype": dtype, **(about or {})}
    (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    return name


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds, checked to be whole; no tensor has been read yet.

    about: config.json. heads: names of what it has on top of the stack.
    """

    family: Family
    config: TransformerConfig
    heads: frozenset[str]
    stored: Mapping[str, Stored]
    about: Values

    @cached_property
    def model(self) -> nn.Module:
        return MODELS[self.family.model][0](self.config)

    @cached_property
    def parameters(self) -> dict[str, Parameter]:
        return parameters(self.family, self.model, self.heads)

    @cached_property
    def rows(self) -> list[Row]:
        return _rows(self.family, self.config, self.parameters)

    def params(self, mesh: Mesh | None = None) -> Params:
        """The parameters, read one tensor at a time straight to where they lie."""
        return nested(
            {
                path: place(
                    (shape := self.parameters[path].shape),
                    self.parameters[path].sharding(mesh),
                    mapping.read(row, part, shape, self.stored.__getitem__),
                )
                for row in self.rows
                for part, path in enumerate(row.paths)
            }
        )

    def check(self, where: Path) -> None:
        """UserError for a tensor that is missing, too much, or of another shape."""
        expected = {
            name: mapping.their_shape(row, self.parameters[row.paths[0]].shape)
            for row in self.rows
            for name in mapping.names(row, self.parameters[row.paths[0]].shape)
        }
        missing = [name for name in expected if name not in self.stored]
        surplus = [name for name in self.stored if name not in expected]
        if missing:
            raise UserError(f"{where} lacks {_some(missing)} of a {self.family.model_type} model")
        if surplus:
            raise UserError(
                f"{where} has {_some(surplus)} that a {self.family.model_type} model of this "
                "config.json has not"
            )
        for name, shape in expected.items():
            if self.stored[name].shape != shape:
                raise UserError(
                    f"{self.stored[name].file}: {name} has the shape {self.stored[name].shape}, "
                    f"not {shape} as config.json says"
                )


def open_checkpoint(path: Path) -> Checkpoint:
    """What is in a folder of `transformers` or a .bin file of llama2.c, checked to be whole."""
    if path.is_file():
        config, stored = llama2c.read(path)
        found = Checkpoint(llama2c.FAMILY, config, frozenset(), stored, {})
        found.check(path)
        return found
    about = _read_config(path)
    kind = about.get("model_type")
    if kind not in FAMILIES:
        raise UserError(
            f"{path}: unknown architecture model_type={kind}; known are {', '.join(FAMILIES)}"
        )
    if about.get("quantization_config"):
        raise UserError(f"{path}: quantised weights are not supported; save the model without")
    family = FAMILIES[kind]
    try:
        config = family.config(about)
    except (UserError, KeyError, TypeError, ValueError) as error:
        what = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: {what}") from error
    stored = _normalised(family, read_folder(path))
    heads = frozenset(
        name for name, head in family.heads.items() if any(row.name in stored for row in head.rows)
    )
    if "classifier.weight" in stored or "classifier.out_proj.weight" in stored:
        output = stored.get("classifier.weight") or stored["classifier.out_proj.weight"]
        config = replace(config, n_classes=output.shape[0])
    tied = config.tie_embeddings and _repeats(stored, family.output, family.table)
    if config.tie_embeddings and not tied and family.model == "encoder_decoder":
        _check_unscaled(path, config)
    config = replace(config, tie_embeddings=tied)
    stored = _without_copies(path, family, tied, stored)
    found = Checkpoint(family, config, heads, stored, about)
    found.check(path)
    return found


def _read_config(folder: Path) -> Values:
    try:
        about = json.loads((folder / "config.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} is no model folder: it has no config.json") from None
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'} is damaged: {error}") from None
    if not isinstance(about, dict):
        raise UserError(f"{folder / 'config.json'} is damaged: it holds no settings")
    return about


def _normalised(family: Family, stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """Tensors by the names of the table: those of a bare model have no prefix, old ones others."""
    bare = not any(name.startswith(family.prefix) for name in stored)
    of_heads = {row.name for head in family.heads.values() for row in head.rows}
    found = {}
    for name, tensor in stored.items():
        for pattern, new in family.renamed.items():
            name = re.sub(pattern, new, name)
        if bare and name not in {family.output, *of_heads, *family.copies}:
            name = family.prefix + name
        if not any(re.fullmatch(pattern, name) for pattern in family.ignored):
            found[name] = tensor
    return found


def _repeats(stored: Mapping[str, Stored], copy: str, original: str) -> bool:
    """Whether a tensor is absent or the same as another; read block by block."""
    if copy not in stored or original not in stored:
        return True
    a, b = stored[copy], stored[original]
    if a.shape != b.shape:
        return False
    step = max(1, mapping.BLOCK_BYTES // (4 * max(1, int(np.prod(a.shape[1:])))))
    return all(
        np.array_equal(a.rows(start, stop), b.rows(start, stop))
        for start in range(0, a.shape[0], step)
        for stop in [min(start + step, a.shape[0])]
    )


def _without_copies(
    path: Path, family: Family, tied: bool, stored: Mapping[str, Stored]
) -> dict[str, Stored]:
    """The tensors without those that repeat others.

    Of an encoder with an untied output layer the copy of the bias is the one that is used.
    """
    found = dict(stored)
    if tied:
        found.pop(family.output, None)
    for copy, original in family.copies.items():
        if copy not in found:
            continue
        if not tied and family.heads:
            found[original] = found.pop(copy)
        elif _repeats(found, copy, original):
            del found[copy]
        else:
            raise UserError(f"{path}: {copy} is not equal to {original}, which it repeats")
    return found


def _check_unscaled(path: Path, config: TransformerConfig) -> None:
    if config.scale_logits:
        raise UserError(
            f"{path}: an output matrix of its own with scaled logits is not supported; "
            "T5 1.1 has tie_word_embeddings=false in config.json"
        )


def _rows(family: Family, config: TransformerConfig, shapes: Mapping[str, Parameter]) -> list[Row]:
    """The lines of the family's table that this model has."""
    rows = [*family.base(config), *(row for head in family.heads.values() for row in head.rows)]
    return [row for row in rows if row.paths[0] in shapes]


def _written(row: Row, layer: int, shape: mapping.Shape, leaves: Mapping[str, Any]) -> np.ndarray:
    return mapping.write(row, layer, shape, [leaves[path] for path in row.paths])


def _family_of(model: nn.Module, leaves: Mapping[str, Any]) -> tuple[Family, frozenset[str]]:
    """The family that computes what a model does, and which heads it has."""
    modules = {path.partition("/")[0] for path in leaves}
    candidates = []
    for family in FAMILIES.values():
        if not isinstance(model, MODELS[family.model][0]):  # type: ignore[arg-type]
            continue
        heads = frozenset(
            name for name, head in family.heads.items() if modules & set(head.modules)
        )
        problems = family.differences(model.config)
        if heads not in family.classes:
            problems.append(f"no class with {' and '.join(sorted(heads))}")
        candidates.append((problems, family, heads))
    if not candidates:
        raise UserError(f"Hugging Face has no architecture like {type(model).__name__}")
    problems, family, heads = min(candidates, key=lambda candidate: len(candidate[0]))
    if problems:
        raise UserError(
            "no architecture of Hugging Face computes what this model does; the nearest, "
            f"{family.model_type}, has not {', '.join(problems)}"
        )
    return family, heads


def _check_parameters(leaves: Mapping[str, Any], shapes: Mapping[str, Parameter]) -> None:
    for path in sorted({*leaves, *shapes}):
        if path not in shapes:
            raise UserError(f"the parameter {path} has no place in the exported model")
        if path not in leaves or leaves[path].shape != shapes[path].shape:
            raise UserError(f"the parameter {path} is missing or of another shape than the model's")


def _some(names: Sequence[str]) -> str:
    shown = f"the tensor {names[0]}"
    return shown if len(names) == 1 else f"{shown} and {len(names) - 1} more"


__all__ = ["FAMILIES", "FLOATS", "Checkpoint", "load", "open_checkpoint", "save"]
