"""Tokenizer `run:WORKDIR`: the tokenizer saved in a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm.data.tokenizer import Tokenizer, load_saved_tokenizer
from lm.storage import open_run_folder


class SavedTokenizer:
    """Tokenizer of a run in a folder or bucket."""

    is_fitted = False

    @staticmethod
    def from_argument(argument: str, data: Any) -> Tokenizer:
        """Open the tokenizer of the run in a folder or bucket."""
        return load_saved_tokenizer(open_run_folder(argument) / "tokenizer")

    @staticmethod
    def from_files(files: Mapping[str, bytes]) -> Tokenizer:
        """Restore a tokenizer that only runs have: one extended with added tokens."""
        from lm.data.chat.extended_tokenizer import ExtendedTokenizer

        return ExtendedTokenizer.from_files(files)
