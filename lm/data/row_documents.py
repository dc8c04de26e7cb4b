"""Documents in a field of rows, such as JSON objects or Parquet rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from lm.data.file_digests import file_digest
from lm.data.files import tell_once
from lm.data.sources import Chunk, DocumentSource, Row, cut_document
from lm.errors import UserError
from lm.storage import read_json

MISSING: Final = object()
CARD_KIND = "lm corpus"  # "kind" in a card.json of `lm corpus`


def field_value(values: Mapping[str, Any], field: str) -> Any:
    """Return the value of a field; MISSING if it does not exist, None below a null.

    Args:
        values: values by name, possibly nested mappings.
        field: name, or dotted path of nested names ("meta.text"). A name that itself contains the
            dots takes precedence.
    """
    if field in values:
        return values[field]
    for dot in (place for place, character in enumerate(field) if character == "."):
        inner = values.get(field[:dot], MISSING)
        if inner is None:
            return None
        if isinstance(inner, Mapping):
            found = field_value(inner, field[dot + 1 :])
            if found is not MISSING:
                return found
    return MISSING


class RowDocuments(DocumentSource):
    """Source in which each row is a document, the text in `data.field`.

    Attributes:
        field: name of the field (`field_value`).
        skip: skip bad rows instead of raising an error.
        files: the files; each may be a tuple of files that are read in parallel.
        row_word: plural noun for rows, for messages.
    """

    row_word = "lines"
    field: str
    skip: bool
    files: Any

    @property
    def card(self) -> str:
        """Digest of the data card that `lm corpus` wrote next to the files, or ""."""
        first = next(iter(self.files))
        card = (first[0] if isinstance(first, tuple) else first).parent / "card.json"
        if not card.is_file():
            return ""
        try:
            kind = read_json(card).get("kind")
        except UserError:
            return ""  # an unrelated file of this name
        return file_digest(card) if kind == CARD_KIND else ""

    def set_field(self, data: Any) -> None:
        """Set field and error policy from section `data` of the configuration."""
        self.field, self.skip = data.field, data.bad_rows == "skip"

    def row_documents(self, path: Path, rows: Iterator[Row]) -> Iterator[Chunk]:
        """Yield the documents in the rows of a file.

        Raises:
            UserError: a row has no text, and bad rows are not skipped.
        """
        n_skipped, first = 0, ""
        for row in rows:
            problem = row.problem or self._problem(row.values)
            if not problem:
                yield from cut_document([without_lone_surrogates(self._text(row.values))])
            elif self.skip:
                n_skipped, first = n_skipped + 1, first or f"{row.where}: {problem}"
            else:
                raise UserError(f"{row.where}: {problem}")
        if n_skipped:
            tell_once(f"{n_skipped} bad {self.row_word} skipped, the first: {first}", path)

    def _text(self, values: dict[str, Any]) -> Any:
        return field_value(values, self.field)

    def _problem(self, values: dict[str, Any]) -> str:
        """Return what is wrong with the document of a row, or ""."""
        text = self._text(values)
        if text is MISSING:
            return no_field(self.field, values)
        if not isinstance(text, str):
            return f"field {self.field!r} is of type {type(text).__name__}, not a string"
        return ""


def no_field(field: str, names: Any) -> str:
    """Return the error message for a field that is not among these names."""
    known = ", ".join(sorted(names)) or "none"
    return f"no field {field!r} (available: {known}): set --config.data.field"


def without_lone_surrogates(text: str) -> str:
    r"""Replace lone surrogates, which JSON can escape ("\ud83d"), by U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
