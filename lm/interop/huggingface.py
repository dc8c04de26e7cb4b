"""Hugging Face `transformers`: model folders loaded as models of this library, and written.

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
from lm.interop.family import Family
from lm.interop.model_folder import Params, open_model_folder
from lm.interop.model_parameters import ParameterSpec, parameter_specs
from lm.interop.model_types import FAMILIES
from lm.interop.tensor_files import PendingTensor, write_tensors
from lm.interop.tensor_mapping import Shape, TensorMapping, hf_shape, make_tensor, tensor_names
from lm.models.transformer_config import TransformerConfig
from lm.models.variables import flat


def load(path: str | Path, mesh: Mesh | None = None) -> tuple[nn.Module, Params]:
    """Load a model from a folder of `transformers` or a .bin file of llama2.c.

    Args:
        path: the folder or file.
        mesh: shards the parameters as in training; None puts them on the first device.

    Returns:
        The Flax module and its float32 parameters.

    Raises:
        UserError: the architecture or a setting is unknown, or a tensor is missing, unexpected, of
            another shape or truncated.
    """
    found = open_model_folder(Path(path))
    return found.model, found.params(mesh)


def save(
    model: nn.Module,
    params: Params,
    path: str | Path,
    *,
    dtype: str = "float32",
    about: Mapping[str, Any] | None = None,
) -> str:
    """Write a model as a folder that `transformers` loads.

    Args:
        model: Flax module.
        params: its parameters.
        path: folder, created if it is not there.
        dtype: float32, bfloat16 or float16.
        about: further values of config.json.

    Returns:
        The name of the `transformers` class.

    Raises:
        UserError: no architecture of `transformers` computes what the model does.
    """
    leaves = flat(nn.meta.unbox(params))
    config: TransformerConfig = model.config  # type: ignore[attr-defined]
    family, heads = _family_of(model, leaves)
    shapes = parameter_specs(family, model, heads)
    _check_parameters(leaves, shapes)
    class_name = family.classes[heads]
    bare = family.prefix if class_name.lower() == f"{family.model_type}model" else ""
    tensors = [
        PendingTensor(
            name.removeprefix(bare),
            hf_shape(mapping, shapes[mapping.paths[0]].shape),
            partial(_make_tensor, mapping, number, shapes[mapping.paths[0]].shape, leaves),
        )
        for mapping in family.mappings(config, shapes)
        for number, name in enumerate(tensor_names(mapping, shapes[mapping.paths[0]].shape))
    ]
    if not config.tie_embeddings and family.heads:
        originals = {tensor.name: tensor for tensor in tensors}
        tensors += [
            replace(originals[of], name=copy)
            for copy, of in family.copies.items()
            if of in originals
        ]
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder, tensors, dtype)
    values = family.write_config(config) | {
        "architectures": [class_name],
        "dtype": dtype,
        **(about or {}),
    }
    (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    return class_name


def _make_tensor(
    mapping: TensorMapping, number: int, shape: Shape, leaves: Mapping[str, Any]
) -> np.ndarray:
    return make_tensor(mapping, number, shape, [leaves[path] for path in mapping.paths])


def _family_of(model: nn.Module, leaves: Mapping[str, Any]) -> tuple[Family, frozenset[str]]:
    """Return the family that computes what a model does, and the model's heads."""
    modules = {path.partition("/")[0] for path in leaves}
    candidates = []
    for family in FAMILIES.values():
        if not isinstance(model, MODELS[family.model]):
            continue
        heads = frozenset(
            name for name, head in family.heads.items() if modules & set(head.modules)
        )
        problems = family.lost_fields(model.config)
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


def _check_parameters(leaves: Mapping[str, Any], shapes: Mapping[str, ParameterSpec]) -> None:
    for path in sorted({*leaves, *shapes}):
        if path not in shapes:
            raise UserError(f"the parameter {path} has no place in the exported model")
        if path not in leaves or leaves[path].shape != shapes[path].shape:
            raise UserError(f"the parameter {path} is missing or of another shape than the model's")
