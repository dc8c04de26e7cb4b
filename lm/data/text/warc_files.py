"""Source `warc`: web archives (WARC) and extracted text (WET), as in Common Crawl."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any

from lm.data.file_digests import file_state, hash_files, require_unchanged
from lm.data.file_parts import FilePart
from lm.data.files import find_files, open_file
from lm.data.sources import Chunk, DocumentSource, Part, cut_document
from lm.errors import UserError, missing_package

_HTML = {"text/html", "application/xhtml+xml"}


class WarcFiles(DocumentSource):
    """WARC and WET files, plain or compressed; PATH may be a glob.

    A document is the text of a conversion record (WET), or the body of a response with status 200:
    plain text, or the main content of HTML. Records without text are skipped.
    """

    def __init__(self, argument: str, data: Any, split: str):
        self.name = f"warc:{argument}"
        try:
            import fastwarc.warc  # noqa: F401
            import resiliparse.extract.html2text  # noqa: F401
        except ImportError as error:
            raise missing_package(self.name, "fastwarc", "warc") from error
        self.files = find_files(argument, data)

    @cached_property
    def digest(self) -> str:
        return hash_files(self.files, "warc")

    def parts(self) -> Sequence[Part]:
        return [FilePart(self.of_file(), path, file_state(path)[2]) for path in self.files]

    def of_file(self, *files: Path) -> WarcFiles:
        """Return a source of only these files."""
        other = copy(self)
        other.__dict__.pop("digest", None)
        other.files = files
        return other

    def chunks(self) -> Iterator[Chunk]:
        for path in self.files:
            for text in _texts(path):
                if text.strip():
                    yield from cut_document([text])


def _texts(path: Path) -> Iterator[str]:
    from fastwarc.warc import ArchiveIterator, WarcRecordType

    kinds = WarcRecordType.response | WarcRecordType.conversion
    try:
        with open_file(path) as file:
            archive = ArchiveIterator(
                file, record_types=kinds, parse_http=False, stream_detect=False
            )
            for record in archive:
                place = record.stream_pos
                record.freeze()
                expected = record.headers.get("Content-Length")
                if str(record.content_length) != expected:
                    raise UserError(
                        f"{path}: truncated: record at byte {place} has {record.content_length} of "
                        f"{expected or 'unknown'} bytes"
                    )
                if record.record_type == WarcRecordType.conversion:
                    yield record.reader.read().decode(errors="replace")
                elif record.is_http:
                    yield _body(record)
        require_unchanged(path)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: damaged WARC file ({error})") from error


def _body(record: Any) -> str:
    """Return the text of a response, or ""."""
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding

    record.parse_http(auto_decode="all")
    kind = record.http_content_type
    if not record.http_headers or record.http_headers.status_code != 200:
        return ""
    if kind not in _HTML and kind != "text/plain":
        return ""
    body = record.reader.read()
    text = bytes_to_str(body, record.http_charset or detect_encoding(body) or "utf-8")
    return text if kind == "text/plain" else extract_plain_text(text, main_content=True)
