"""Models of Hugging Face's `transformers`: from their folders to our models and back.

    model, params = load("folder")  # config.json and safetensors
    logits_BLV = model.apply({"params": params}, tokens_BL)
    save(model, params, "other_folder")

An encoder–decoder takes two inputs; a bare encoder has no logits, and `method="hidden"` encodes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from jax.sharding import Mesh

from lm.config.registries import MODELS
from lm.errors import UserError
from lm.interop import tensor_mapping as mapping
from lm.interop.family import Family
from lm.interop.model_folder import Params, open_checkpoint
from lm.interop.model_parameters import Parameter, parameters
from lm.interop.model_types import FAMILIES
from lm.interop.tensor_files import Made, write_folder
from lm.interop.tensor_mapping import TensorMapping
from lm.models.transformer_config import TransformerConfig
from lm.optim.parameter_groups import flat


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
            partial(_written, row, number, shapes[row.paths[0]].shape, leaves),
        )
        for row in family.rows(config, shapes)
        for number, theirs in enumerate(mapping.names(row, shapes[row.paths[0]].shape))
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


def _written(
    row: TensorMapping, number: int, shape: mapping.Shape, leaves: Mapping[str, Any]
) -> np.ndarray:
    return mapping.write(row, number, shape, [leaves[path] for path in row.paths])


def _family_of(model: nn.Module, leaves: Mapping[str, Any]) -> tuple[Family, frozenset[str]]:
    """The family that computes what a model does, and which heads it has."""
    modules = {path.partition("/")[0] for path in leaves}
    candidates = []
    for family in FAMILIES.values():
        if not isinstance(model, MODELS[family.model]):
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
