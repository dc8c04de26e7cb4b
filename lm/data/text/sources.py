"""From a source named in the config to a corpus: the table of kinds."""

from __future__ import annotations

import os
from typing import Any

from lm.config.registries import SOURCES
from lm.config.rules import spec_problem
from lm.data.files import find_files
from lm.data.text.corpus import Corpus
from lm.data.text.held_out import HeldOut
from lm.data.text.stdlib_corpus import StandardLibrary
from lm.data.text.text_files import JsonLines, TextFiles
from lm.data.text.tfds_corpus import has_split, open_tfds
from lm.errors import UserError


def sources(text: str) -> tuple[str, ...]:
    """The specs in a comma-separated list, such as "stdlib,text:*.txt"."""
    return tuple(spec for part in text.split(",") if (spec := part.strip()))


def open_corpus(spec: str, data: Any, split: str) -> Corpus:
    """Opens the `split` ("train" or "validation") of one source.

    A source without a validation split of its own gives `data.validation_fraction` of it to
    "validation" and the rest to "train". If there is a `data.validation_source` nothing is held
    out, and a source without splits is whole under either name. UserError for a source that is
    unknown, missing, empty, or has no such split.
    """
    _check_kind(spec)
    hold_out = bool(data.validation_fraction) and not data.validation_source
    if split == "validation" and not data.validation_source and not has_validation(spec, data):
        raise UserError(
            f"{spec} has no validation split: set --config.data.validation_source "
            "or --config.data.validation_fraction"
        )
    if hold_out and not _has_own_validation(spec, data):
        corpus: Corpus = HeldOut(_open(spec, data, "train"), data.validation_fraction, split)
    else:
        corpus = _open(spec, data, split)
    return corpus


def has_validation(spec: str, data: Any) -> bool:
    """Whether `open_corpus(spec, data, "validation")` has something to hold back from training."""
    _check_kind(spec)
    return bool(data.validation_fraction) or _has_own_validation(spec, data)


def _check_kind(spec: str) -> None:
    if problem := spec_problem(SOURCES, spec, "documents"):
        raise UserError(problem)


def _open(spec: str, data: Any, split: str) -> Corpus:
    kind, _, argument = spec.partition(":")
    corpus = SOURCES[kind](argument, data, split)
    if next(corpus.chunks(), None) is None:
        raise UserError(f"{spec} holds no text")
    return corpus


def _has_own_validation(spec: str, data: Any) -> bool:
    kind, _, argument = spec.partition(":")
    if kind == "tfds":
        return has_split(argument, data.validation_split, _tfds_directory(data))
    return kind == "stdlib"


def open_stdlib(argument: str, data: Any, split: str) -> Corpus:
    """Open the source code of Python's standard library."""
    return StandardLibrary(split)


def open_text(pattern: str, data: Any, split: str) -> Corpus:
    """Open text files."""
    return TextFiles(f"text:{pattern}", find_files(pattern, data), data.documents)


def open_jsonl(pattern: str, data: Any, split: str) -> Corpus:
    """Open files of JSON lines."""
    return JsonLines(f"jsonl:{pattern}", find_files(pattern, data), data.field)


def open_tfds_split(name: str, data: Any, split: str) -> Corpus:
    """Open a split of a TFDS data set."""
    name_of_split = data.validation_split if split == "validation" else data.split
    return open_tfds(name, name_of_split, data.field, _tfds_directory(data))


def _tfds_directory(data: Any) -> str | None:
    return data.directory or os.environ.get("TFDS_DATA_DIR")
