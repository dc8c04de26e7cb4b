"""Opening and verification of `transformers` model folders, or a llama2.c .bin file."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from jax.sharding import Mesh

from lm.config.registries import MODELS
from lm.errors import UserError
from lm.interop import (
    bart,
    bert,
    deberta,
    deepseek,
    gemma,
    gpt2,
    gpt_oss,
    llama,
    llama2c,
    llama4,
    mamba_families,
    modernbert,
    olmo,
    qwen3_next,
    qwen_moe,
    small_models,
    t5,
    whisper,
)
from lm.interop.family import Family, Values, states_class
from lm.interop.folder_heads import folder_heads, unused_tensors
from lm.interop.fused_tensors import split
from lm.interop.model_parameters import ParameterSpec, load_sharded, parameter_specs, zeros
from lm.interop.tensor_files import StoredTensor, read_tensors
from lm.interop.tensor_mapping import (
    BLOCK_BYTES,
    TensorMapping,
    hf_shape,
    read_parameter,
    tensor_names,
)
from lm.models.transformer_config import TransformerConfig
from lm.models.variables import flat, nested
from lm.storage import read_json

ADAPTER = "adapter_config.json"
_WRONG_VALUE = (KeyError, TypeError, ValueError, AttributeError, ArithmeticError)

Params = Any

# Families that can be imported and exported, by `model_type`.
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        gpt2.GPT2,
        bert.BERT,
        bert.ROBERTA,
        bert.ELECTRA,
        modernbert.MODERNBERT,
        deberta.DEBERTA,
        bart.BART,
        bart.MBART,
        whisper.WHISPER,
        t5.T5,
        t5.MT5,
        t5.UMT5,
        llama.LLAMA,
        llama.MISTRAL,
        llama.MIXTRAL,
        llama.QWEN2,
        llama.QWEN3,
        qwen_moe.QWEN2_MOE,
        qwen_moe.QWEN3_MOE,
        qwen3_next.QWEN3_NEXT,
        olmo.OLMO2,
        olmo.OLMO3,
        olmo.OLMOE,
        gemma.GEMMA,
        gemma.GEMMA2,
        gemma.GEMMA3,
        deepseek.DEEPSEEK_V2,
        deepseek.DEEPSEEK_V3,
        gpt_oss.GPT_OSS,
        small_models.SMOLLM3,
        llama4.LLAMA4,
        small_models.GRANITE,
        small_models.GRANITE_MOE,
        small_models.PHI3,
        small_models.STABLELM,
        mamba_families.MAMBA2,
        mamba_families.BAMBA,
    )
} | {"kimi_k2": deepseek.DEEPSEEK_V3}
# Those of the classes that have the encoder of such a model alone.
ENCODERS: dict[str, Family] = t5.ENCODERS


@dataclass(frozen=True)
class ModelFolder:
    """Verified model folder; no tensor has been read yet.

    Attributes:
        family: family of its `model_type`.
        config: configuration of the model.
        heads: names of its heads.
        stored: tensors by name in the family's table.
        about: values of config.json.
        unused: tensors that its class does not use, and that are left out.
    """

    family: Family
    config: TransformerConfig
    heads: frozenset[str]
    stored: Mapping[str, StoredTensor]
    about: Values
    unused: tuple[str, ...] = ()

    @cached_property
    def model(self) -> nn.Module:
        """Flax module."""
        return MODELS[self.family.model](self.config)

    @cached_property
    def parameters(self) -> dict[str, ParameterSpec]:
        """Shape and logical axes of every parameter, by path."""
        return parameter_specs(self.family, self.model, self.heads)

    @cached_property
    def mappings(self) -> list[TensorMapping]:
        """Rows of the tensor table."""
        return self.family.mappings(self.config, self.parameters, self.heads)

    def params(self, mesh: Mesh | None = None) -> Params:
        """Read the parameters, one tensor at a time, directly into their shards."""
        found = {
            path: load_sharded(
                (shape := self.parameters[path].shape),
                self.parameters[path].sharding(mesh),
                read_parameter(mapping, part, shape, self.stored.__getitem__),
            )
            for mapping in self.mappings
            for part, path in enumerate(mapping.paths)
        }
        absent = {path: spec for path, spec in self.parameters.items() if path not in found}
        found |= {path: zeros(spec.shape, spec.sharding(mesh)) for path, spec in absent.items()}
        return nested(found)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the table's tensors, by name."""
        return {
            name: hf_shape(mapping, self.parameters[mapping.paths[0]].shape)
            for mapping in self.mappings
            for name in tensor_names(mapping, self.parameters[mapping.paths[0]].shape)
        }

    def check(self, where: Path) -> None:
        """Raise UserError for a tensor that is missing, unexpected or has the wrong shape."""
        expected = self.shapes
        missing = [name for name in expected if name not in self.stored]
        surplus = [name for name in self.stored if name not in expected]
        classes, stated = self.family.classes.values(), self.about.get("architectures")
        other = ""
        if stated and not states_class(self.about, classes):
            other = f"; config.json has architectures={stated!r:.60}, not {' or '.join(classes)}"
        if missing:
            raise UserError(
                f"{where} lacks {some_tensors(missing)} of a {self.family.model_type} model{other}"
            )
        if surplus:
            raise UserError(
                f"{where} has {some_tensors(surplus)}, which a {self.family.model_type} model with "
                f"this config.json does not have{other}"
            )
        for name, shape in expected.items():
            self.stored[name].check_weights()
            if self.stored[name].shape != shape:
                raise UserError(
                    f"{self.stored[name].file}: {name} has the shape {self.stored[name].shape}, "
                    f"not {shape} as config.json says"
                )


def open_model_folder(path: Path) -> ModelFolder:
    """Open and verify a folder of `transformers` or a .bin file of llama2.c.

    Raises:
        UserError: the architecture or a setting is unknown, or a tensor is missing, unexpected,
            truncated or has the wrong shape.
    """
    if path.is_file():
        config, stored = llama2c.read_bin(path)
        found = ModelFolder(llama2c.FAMILY, config, frozenset(), stored, {})
        found.check(path)
        return found
    if (path / ADAPTER).exists():
        raise UserError(
            f"{path} contains an adapter of a model ({ADAPTER}), which is not supported: save "
            "the model with the adapter merged into it"
        )
    about = _read_config(path)
    kind = about.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"{path}: unknown architecture model_type={kind}; known: {', '.join(FAMILIES)}"
        )
    family, encoder = FAMILIES[kind], ENCODERS.get(kind)
    if encoder and states_class(about, encoder.classes.values()):
        family = encoder
    try:
        config = family.read_config(about)
    except UserError as error:
        is_named = any(key in str(error) for key in about)
        key = "" if is_named else _wrong_key(family, about).replace(": ", "; config.json has ", 1)
        raise UserError(f"{path}: {error}{key}") from error
    except _WRONG_VALUE as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: config.json{_wrong_key(family, about)}: {what}") from error
    tensors = read_tensors(path)
    if (quantization := about.get("quantization_config")) is not None:
        if not isinstance(quantization, dict):
            raise UserError(f"{path}: quantization_config of config.json is not an object")
        from lm.interop import compressed_tensors, fp8_blocks, mxfp4

        readers = {"fp8": fp8_blocks.fp8_weights, "mxfp4": mxfp4.mxfp4_weights}
        method = str(quantization.get("quant_method"))
        tensors = readers.get(method, compressed_tensors.unpacked)(path, quantization, tensors)
    stored = _by_table_name(family, tensors)
    further = _further_layers(about, config, stored)
    stored = {name: tensor for name, tensor in stored.items() if name not in further}
    stored = family.adapted(about, stored)
    stored = _without_constants(path, family, config, stored)
    _check_further_files(path, family, config)
    _check_layers(path, config, len(stored))
    heads = folder_heads(family, about, stored)
    unused = unused_tensors(family, heads, stored)
    stored = {name: tensor for name, tensor in stored.items() if name not in unused}
    for name in heads:
        for mapping in family.heads[name].mappings:
            if mapping.paths == ("classifier/kernel",) and mapping.name in stored:
                n_classes = next(iter(stored[mapping.name].shape), 0)
                config = replace(config, n_classes=n_classes)
    if any(family.heads[name].replaces_output for name in heads):
        # There is no output projection to tie to.
        config = replace(config, tie_embeddings=not config.separate_tokens)
    if family.output not in stored and is_without_output(family, about):
        config = replace(config, tie_embeddings=True)
    tied = config.tie_embeddings and _repeats(stored, family.output, family.table)
    if config.tie_embeddings and not tied and family.model == "encoder_decoder":
        _check_unscaled(path, config)
    config = replace(config, tie_embeddings=tied)
    stored, replaced = _without_copies(path, family, config, stored)
    found = ModelFolder(family, config, heads, stored, about, (*further, *unused, *replaced))
    if family.fused:
        times = {name: count(config) for name, count in family.alternating.items()}
        parts = split(path, family.fused, times, config.n_layers, found.shapes, stored)
        found = replace(found, stored=parts)
    found.check(path)
    return found


def is_without_output(family: Family, about: Values) -> bool:
    """Return whether config.json names a decoder's class without an output, such as LlamaModel."""
    stated = about.get("architectures")
    names = [str(name) for name in stated] if isinstance(stated, list) else []
    is_bare = any(name.endswith("Model") for name in names)
    return is_bare and family.model == "decoder" and not {*names} & {*family.classes.values()}


def _wrong_key(family: Family, about: Values) -> str:
    """Return the key, with its value, without which config.json can be read; "" if none alone."""
    for name in about:
        try:
            family.read_config({key: x for key, x in about.items() if key != name})
        except (UserError, *_WRONG_VALUE):
            continue
        return f": {name}={about[name]!r:.40}"
    return ""


def _read_config(folder: Path) -> Values:
    try:
        return read_json(folder / "config.json", whole_characters=True)
    except FileNotFoundError:
        raise UserError(f"{folder} is not a model folder: it has no config.json") from None


def _by_table_name(family: Family, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Rename tensors of bare models and old versions to the names in the table."""
    renamed = dict(family.renamed)
    for head in family.heads.values():
        renamed |= {f"^{re.escape(head.prefix)}": family.prefix} if head.prefix else {}
    of_heads = {m.name for head in family.heads.values() for m in head.mappings}
    found: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        for pattern, new in renamed.items():
            name = re.sub(pattern, new, name)
        found[name] = tensor
    bare = not any(name.startswith(family.prefix) for name in found)
    stored, found = found, {}
    for name, tensor in stored.items():
        if bare and name not in {family.output, *of_heads, *family.copies}:
            name = family.prefix + name
        if not any(re.fullmatch(pattern, name) for pattern in family.ignored):
            found[name] = tensor
    return found


def _further_layers(about: Values, config: TransformerConfig, stored: Collection[str]) -> list[str]:
    """Return the tensors of extra layers, which predict tokens beyond the next.

    DeepSeek-V3 numbers them like the others; Qwen3-Next calls them "mtp".
    """
    n_further = about.get("num_nextn_predict_layers")
    if n_further is None:
        n_further = sum(name.endswith(".eh_proj.weight") for name in stored)
    n_further = n_further if isinstance(n_further, int) else 0
    starts = [f"model.layers.{config.n_layers + i}." for i in range(min(n_further, 64))]
    return sorted(name for name in stored if name.startswith(("mtp.", *starts)))


def _without_constants(
    path: Path, family: Family, config: TransformerConfig, stored: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Drop the constant tensors, which may be rounded to bfloat16.

    Raises:
        UserError: one has other values.
    """
    for name, values in family.constants.items():
        if (tensor := stored.pop(name, None)) is None:
            continue
        expected, tensor_shape = values(config), tensor.shape
        if tensor_shape != expected.shape:
            raise UserError(
                f"{path}: {name} has the shape {tensor_shape}, not {expected.shape} as config.json "
                "says"
            )
        tensor.check_weights()
        limits = 2**-8 * np.abs(expected) + 2e-4 * np.abs(expected).max(initial=0)
        if not np.all(np.abs(tensor.rows(0, tensor_shape[0]) - expected) <= limits):
            what = "has unusual values" if expected.any() else "is not zero"
            raise UserError(f"{path}: {name} {what}, which is not supported")
    return stored


def _check_further_files(path: Path, family: Family, config: TransformerConfig) -> None:
    for name, values in family.further_files.items():
        try:
            found = read_json(path / name, whole_characters=True)
        except FileNotFoundError:
            continue
        expected = flat(values(config))
        for key, value in flat(found).items():
            if key in expected and value != expected[key]:
                raise UserError(
                    f"{path / name}: {key}={value!r:.40} is not supported, only {expected[key]!r}"
                )


def _repeats(stored: Mapping[str, StoredTensor], copy: str, original: str) -> bool:
    """Return whether a tensor is absent or equals another one, reading block by block."""
    if copy not in stored or original not in stored:
        return True
    a, b = stored[copy], stored[original]
    if a.shape != b.shape or not a.shape:
        return False
    step = max(1, BLOCK_BYTES // (4 * max(1, int(np.prod(a.shape[1:])))))
    return all(
        np.array_equal(a.rows(start, stop), b.rows(start, stop))
        for start in range(0, a.shape[0], step)
        for stop in [min(start + step, a.shape[0])]
    )


def _without_copies(
    path: Path, family: Family, config: TransformerConfig, stored: Mapping[str, StoredTensor]
) -> tuple[dict[str, StoredTensor], list[str]]:
    """Drop the tensors that repeat others; also return the names of those that others replace.

    In an encoder with an untied output layer the copied bias is the one in use.
    """
    found, replaced, tied = dict(stored), [], config.tie_embeddings
    own = {mapping.name for mapping in family.base(config)}
    if tied:
        found.pop(family.output, None)
    for copy, original in family.copies.items():
        if copy not in found or copy in own:
            continue
        if not tied and family.model == "encoder":
            replaced += [] if _repeats(found, copy, original) else [original]
            found[original] = found.pop(copy)
        elif _repeats(found, copy, original):
            del found[copy]
        else:
            raise UserError(
                f"{path}: {copy} differs from {original}, which it should repeat: further tables "
                "(tie_word_embeddings=false) are not supported"
            )
    return found, replaced


def _check_layers(path: Path, config: TransformerConfig, n_tensors: int) -> None:
    """Raise UserError for many layers, or experts in them, with few tensors in the file."""
    n_layers = config.n_layers + config.n_decoder_layers

    def counts() -> Iterator[tuple[int, str]]:
        yield n_layers, "layers"
        types = [layer.feed_forward for layer in config.layer_types(n_layers)]
        yield types.count("experts") * config.n_experts, "experts"

    for n, what in counts():
        if n > n_tensors:
            raise UserError(
                f"{path}: config.json has {n} {what}, but there are only {n_tensors} tensors"
            )
    if config.n_experts and config.experts_per_token > config.n_experts:
        raise UserError(
            f"{path}: config.json has {config.n_experts} experts, but {config.experts_per_token} "
            "per token"
        )


def _check_unscaled(path: Path, config: TransformerConfig) -> None:
    if config.scale_logits:
        raise UserError(
            f"{path}: an untied output matrix with scaled logits is not supported; "
            "T5 1.1 has tie_word_embeddings=false in config.json"
        )


def some_tensors(names: Sequence[str]) -> str:
    """Return the first of these names, and the number of others."""
    shown = f"the tensor {names[0]}"
    return shown if len(names) == 1 else f"{shown} and {len(names) - 1} more"
