"""Hugging Face `transformers`: loading and writing model folders.

    model, params = load("folder")  # config.json and safetensors
    logits_BLV = model.apply({"params": params}, tokens_BL)
    save(model, params, "other_folder")

An encoder–decoder takes two inputs; a bare encoder has no logits, and `method="hidden"` encodes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from jax.sharding import Mesh

from lm.config.registries import MODELS
from lm.errors import UserError
from lm.interop.family import Family, UnsupportedConfig
from lm.interop.folder_heads import TASK_MODULES
from lm.interop.fused_tensors import fuse
from lm.interop.model_folder import ENCODERS, FAMILIES, Params, open_model_folder
from lm.interop.model_parameters import ParameterSpec, parameter_specs
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
        UserError: the architecture or a setting is unknown, or a tensor is missing, unexpected,
            truncated or has the wrong shape.
    """
    found = open_model_folder(Path(path))
    return found.model, found.params(mesh)


@dataclass(frozen=True)
class HuggingFaceModel:
    """Model converted for `transformers`.

    Attributes:
        family: its family there.
        config: configuration, with the biases that it has there.
        class_name: name of the class.
        tensors: its tensors, which are computed on demand.
        has_classes: whether it has a classifier.
        mappings: rows of the tensor table that were used.
        shapes: its parameters by path.
    """

    family: Family
    config: TransformerConfig
    class_name: str
    tensors: tuple[PendingTensor, ...]
    has_classes: bool
    mappings: Sequence[TensorMapping]
    shapes: Mapping[str, ParameterSpec]


def convert(
    model: nn.Module, params: Params, model_type: str | None = None, of_tokens: bool = False
) -> HuggingFaceModel:
    """Convert a model to tensors of `transformers`; for arguments and errors see `save`."""
    leaves = flat(nn.meta.unbox(params))
    family, heads, config = _family_of(model, leaves, model_type, of_tokens)
    shapes = parameter_specs(family, model.clone(config=config), heads)
    left_out = {path for path in leaves if path.partition("/")[0] in family.left_out}
    leaves = {path: leaf for path, leaf in leaves.items() if path not in left_out}
    leaves = _neutral_zeros(leaves, shapes) | leaves
    mappings = family.mappings(config, shapes, heads)
    written = {path for mapping in mappings for path in mapping.paths}
    _check_parameters(leaves, shapes, written)
    class_name = family.classes[heads]
    tensors = [
        PendingTensor(
            name,
            hf_shape(mapping, shapes[mapping.paths[0]].shape),
            partial(_make_tensor, mapping, number, shapes[mapping.paths[0]].shape, leaves),
        )
        for mapping in mappings
        for number, name in enumerate(tensor_names(mapping, shapes[mapping.paths[0]].shape))
    ]
    replaces_output = any(family.heads[name].replaces_output for name in heads)
    tensors += [
        PendingTensor(name, values(config).shape, partial(values, config))
        for name, values in family.constants.items()
        if not replaces_output
    ]
    times = {name: count(config) for name, count in family.alternating.items()}
    tensors = [
        replace(tensor, name=family.renamed_to(class_name, tensor.name))
        for tensor in fuse(family.fused, times, config.n_layers, tensors)
    ]
    has_classes = any(path.startswith("classifier/") for path in leaves)
    of_table = mappings, shapes
    return HuggingFaceModel(family, config, class_name, tuple(tensors), has_classes, *of_table)


def save(
    model: nn.Module,
    params: Params,
    path: str | Path,
    *,
    dtype: str = "float32",
    about: Mapping[str, Any] | None = None,
    model_type: str | None = None,
    of_tokens: bool = False,
    quantize: str = "",
) -> str:
    """Write a model as a folder that `transformers` loads.

    Args:
        model: Flax module.
        params: its parameters.
        path: folder, created if necessary.
        dtype: float32, bfloat16 or float16.
        about: further values of config.json.
        model_type: architecture to use if several compute the same function.
        of_tokens: whether a classifier is one of every token, where its class depends on it.
        quantize: int8 or int4 for the layers' matrices; "" for none.

    Returns:
        The name of the `transformers` class.

    Raises:
        UserError: no architecture of `transformers` computes the same function as the model.
    """
    found = convert(model, params, model_type, of_tokens)
    family, config, tensors = found.family, found.config, list(found.tensors)
    if not config.tie_embeddings and family.model == "encoder":
        originals = {tensor.name: tensor for tensor in tensors}
        tensors += [
            replace(originals[of], name=copy)
            for copy, of in family.copies.items()
            if of in originals
        ]
    quantized_inputs: dict[str, int] = {}
    if quantize:
        from lm.interop.compressed_tensors import quantization_config, quantized

        mappings, shapes = found.mappings, found.shapes
        quantized_inputs = _quantized_inputs(family, mappings, shapes)
        names = {
            family.renamed_to(found.class_name, name)
            for mapping in mappings
            if mapping.name in quantized_inputs
            for name in tensor_names(mapping, shapes[mapping.paths[0]].shape)
        }
        plain = tensors
        tensors = [tensor for tensor in plain if tensor.name not in names]
        for tensor in plain:
            tensors += quantized(tensor, quantize) if tensor.name in names else []
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder, tensors, dtype)
    values = family.write_config(config) | {
        "architectures": [found.class_name],
        "dtype": dtype,
        **(class_labels(config.n_classes) if found.has_classes else {}),
        **(about or {}),
    }
    if quantize:
        values["quantization_config"] = quantization_config(quantized_inputs, quantize)
    files = {"config.json": values} | {
        name: further(config) for name, further in family.further_files.items()
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    return found.class_name


def _quantized_inputs(
    family: Family, mappings: Sequence[TensorMapping], shapes: Mapping[str, ParameterSpec]
) -> dict[str, int]:
    """Return the number of inputs of the layers' linear maps, by mapping name.

    Raises:
        UserError: the class of `transformers` has no `Linear` layers, which are needed here.
    """
    has_experts = any(path.endswith("/router/kernel") for path in shapes)
    if family.model_type == "gpt2" or has_experts or family.fused:
        raise UserError(
            f"--quantize: transformers has no quantized layers for {family.model_type}; "
            "--format gguf --dtype q8_0 writes 8 bits of models that GGUF export supports"
        )
    found = {}
    for mapping in mappings:
        path = mapping.paths[0]
        shape = hf_shape(mapping, shapes[path].shape)
        if path.endswith("/kernel") and "/layers" in path and len(shape) == 2:
            found[mapping.name] = shape[1]
    return found


def class_labels(n_classes: int, names: Sequence[str] = ()) -> dict[str, Any]:
    """Return a classifier's labels for config.json; missing names as in `transformers`."""
    names = [*names, *(f"LABEL_{i}" for i in range(len(names), n_classes))]
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def _make_tensor(
    mapping: TensorMapping, number: int, shape: Shape, leaves: Mapping[str, Any]
) -> np.ndarray:
    return make_tensor(mapping, number, shape, [leaves[path] for path in mapping.paths])


def _family_of(
    model: nn.Module, leaves: Mapping[str, Any], preferred: str | None, of_tokens: bool
) -> tuple[Family, frozenset[str], TransformerConfig]:
    """Return the family that computes the same as a model, its heads, and its configuration.

    If only a model with biases is found (GPT-2), the configuration has them, and they are zero.
    """
    modules = {path.partition("/")[0] for path in leaves}
    own: TransformerConfig = model.config  # type: ignore[attr-defined]
    families = [
        family
        for family in (*FAMILIES.values(), *ENCODERS.values())
        if isinstance(model, MODELS[family.model])
        and bool(own.n_mels) == (family.objective == "transcription")
    ]
    if not families:
        raise UserError(f"no Hugging Face architecture corresponds to {type(model).__name__}")
    biased = replace(own, bias=True, norm_bias=True, attention_bias="same")
    left_out = {module for family in families for module in family.left_out}
    candidates = []
    for config, family in product((own, biased), families):
        heads = family.heads_of(modules, of_tokens)
        try:
            problems, is_like = family.lost_fields(config, bool(modules & TASK_MODULES)), True
        except UnsupportedConfig as error:  # there may be more problems than this one
            problems, is_like = [str(error)], False
        if heads is None:
            names = sorted({m for head in family.heads.values() for m in head.modules} & modules)
            what = " of every token" if of_tokens else ""
            problems.append(f"a class with {' and '.join(names)} alone{what}")
        known = {*family.left_out, *(m for head in family.heads.values() for m in head.modules)}
        problems += [f"a {m}" for m in sorted((modules & left_out) - known)]
        rank = len(problems) + (not is_like), family.model_type != preferred
        candidates.append((rank, problems, family, heads or frozenset(), config))
    _, problems, family, heads, config = min(candidates, key=lambda found: found[0])
    if problems:
        raise UserError(
            "no Hugging Face architecture computes the same function as this model; the closest, "
            f"{family.model_type}, does not have {', '.join(problems)}"
        )
    return family, heads, config


def _neutral_zeros(
    leaves: Mapping[str, Any], shapes: Mapping[str, ParameterSpec]
) -> dict[str, np.ndarray]:
    """Return zeros for the biases, and next-sentence head, that a model lacks."""
    absent = [path for path in shapes if path not in leaves]
    return {
        path: np.zeros(shapes[path].shape, np.float32)
        for path in absent
        if path.endswith("/bias") or path.startswith("sentence_head/")
    }


def _check_parameters(
    leaves: Mapping[str, Any], shapes: Mapping[str, ParameterSpec], written: Collection[str]
) -> None:
    for path in sorted({*leaves, *shapes}):
        if path not in shapes:
            raise UserError(f"the parameter {path} does not exist in the exported model")
        if path not in leaves or leaves[path].shape != shapes[path].shape:
            raise UserError(f"the parameter {path} is missing or has a different shape")
        if path not in written and np.any(leaves[path]):
            raise UserError(
                f"the exported model has no {path}, which is not zero: train with "
                f"--config.optimizer.freeze={path}, which keeps it zero"
            )
