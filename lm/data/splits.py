"""Validation and test data of a run, for evaluation."""

from __future__ import annotations

from typing import Any

from lm.config.registry import listed
from lm.data.dataset import Store, build_store, holds_out_records, open_sources, open_validation
from lm.data.held_out import split_records
from lm.data.tokenizer import Tokenizer
from lm.errors import UserError


def open_split(
    data: Any, split: str, tokenizer: Tokenizer, columns: tuple[str, ...], progress: bool = False
) -> tuple[Store, ...]:
    """Open the stores of one split.

    Args:
        data: section `data` of the configuration.
        split: "validation" or "test".
        tokenizer: tokenizer of the stores.
        columns: record columns of the sources; () for documents.
        progress: show progress bars on stderr.

    Raises:
        UserError: the configuration does not have this split, or its source is missing or damaged.
    """
    if split == "validation" and holds_out_records(data, columns):
        training = open_sources(listed(data.source), data, "train", columns)
        stores = (build_store(source, tokenizer, data, progress) for source in training)
        return tuple(split_records(store, data)[1] for store in stores)
    if split == "test":
        own_split = "validation" if columns else "test"
        sources = open_sources(listed(data.test_source), data, own_split, columns)
    else:
        sources = open_validation(data, columns)
    if not sources:
        raise UserError(f"the configuration has no {split} data; set --config.data.{split}_source")
    return tuple(build_store(source, tokenizer, data, progress) for source in sources)
