"""Source files that are truncated, extended or changed at any byte: never a traceback.

Where a checksum covers the content the documents are the same, or there is an error; elsewhere
there may be other documents. An error is one line that names the file.
"""

import bz2
import gzip
import io
import json
import lzma

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm.data import file_digests
from lm.data.dataset import build_store, open_corpus
from lm.data.tokenizers.basic import ByteTokenizer
from lm.errors import UserError

TEXTS = [f"größer {i} " + "words of a document, " * (7 * i % 40) for i in range(40)]
TABLE = pa.table({"text": TEXTS, "meta": pa.array([{"id": i} for i in range(40)])})


def _arrow(make):
    sink = io.BytesIO()
    with make(sink, TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=9)
    return sink.getvalue()


def _parquet(**options):
    sink = io.BytesIO()
    pq.write_table(TABLE, sink, row_group_size=9, **options)
    return sink.getvalue()


def _index():
    head = b"MMIDIDX\0\0" + bytes([1, 0, 0, 0, 0, 0, 0, 0, 8])
    lengths, bounds = np.full(40, 50, "<i4"), np.arange(41, dtype="<i8")
    counts = np.asarray([40, 41], "<i8")
    return b"".join(
        part if isinstance(part, bytes) else part.tobytes()
        for part in (head, counts, lengths, np.arange(40, dtype="<i8") * 100, bounds)
    )


def _warc():
    records = []
    for text in TEXTS:
        body = text.encode()
        lines = ["WARC/1.0", "WARC-Type: conversion", f"Content-Length: {len(body)}"]
        lines += ["WARC-Target-URI: http://x.example/", "Content-Type: text/plain"]
        lines += ["WARC-Record-ID: <urn:uuid:00000000-0000-0000-0000-000000000000>"]
        lines += ["WARC-Date: 2026-01-01T00:00:00Z"]
        records.append("\r\n".join([*lines, "", ""]).encode() + body + b"\r\n\r\n")
    return b"".join(records)


LINES = "".join(f"{text}\n" for text in TEXTS).encode()
OBJECTS = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
IDS = np.arange(2000, dtype="<u2") % 250
# By name: kind of source, name of the file, content; what else lies beside it.
SOURCES = {
    "text": ("text", "f.txt", LINES),
    "lines": ("text", "f.txt", LINES),
    "jsonl": ("jsonl", "f.jsonl", OBJECTS),
    "warc": ("warc", "f.warc", _warc()),
    "parquet": ("parquet", "f.parquet", _parquet()),
    "parquet, checked": ("parquet", "f.parquet", _parquet(write_page_checksum=True)),
    "parquet, plain": ("parquet", "f", _parquet(compression="none", use_dictionary=False)),
    "arrow stream": ("arrow", "f.arrow", _arrow(pa.ipc.new_stream)),
    "arrow file": ("arrow", "f.arrow", _arrow(pa.ipc.new_file)),
    "nanogpt": ("nanogpt", "f.bin", IDS.tobytes()),
    "megatron": ("megatron", "f.bin", IDS.tobytes()),
    "megatron index": ("megatron", "f.idx", _index()),
}
COMPRESS = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".zst": lambda content: zstd.compress(
        content, options={zstd.CompressionParameter.checksum_flag: 1}
    ),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
EXAMPLES = 60
CASES = [
    (name, ending)
    for name, (kind, *_) in SOURCES.items()
    for ending in (COMPRESS if kind in ("text", "jsonl", "warc") else ("",))
]


CHANGES = st.tuples(
    st.sampled_from(["cut", "extend", "double", "flip", "flip", "overwrite", "drop"]),
    st.integers(0, 10**6) | st.integers(-40, 40),  # also near an end, where indices are
    st.binary(min_size=1, max_size=12),
)


def changed(content, kind, place, other):
    """Return content that is cut, extended or has other bytes at a place."""
    place %= len(content)
    if kind == "cut":
        return content[:place]
    if kind == "extend":
        return content + other
    if kind == "double":
        return content + content
    if kind == "drop":
        return content[:place] + content[place + len(other) :]
    if kind == "flip":
        other = bytes([content[place] ^ (other[0] or 1)])
    return content[:place] + other + content[place + len(other) :]


@pytest.mark.parametrize(("name", "ending"), CASES)
def test_damaged_file_is_a_line_or_the_same_documents(
    make_data, tmp_path, monkeypatch, name, ending
):
    kind, file, content = SOURCES[name]
    data = make_data(token_dtype="uint16" * (kind == "nanogpt"), end_token="none")
    data.documents = "line" if name == "lines" else "file"
    monkeypatch.setattr(file_digests, "_cache", None)
    (tmp_path / "f.bin").write_bytes(IDS.tobytes())
    (tmp_path / "f.idx").write_bytes(_index())
    path = tmp_path / f"{file}{ending}"
    spec = f"{kind}:f" if kind == "megatron" else f"{kind}:{path.name}"

    def documents(content):
        path.write_bytes(content)
        corpus = open_corpus(spec, data, "train")
        if kind in ("nanogpt", "megatron"):
            data.cache_directory = str(tmp_path / f"cache {corpus.digest}")
            store = build_store(corpus, ByteTokenizer(), data, progress=False)
            return np.asarray(store.tokens).tolist(), np.asarray(store.offsets).tolist()
        return list(corpus.chunks())

    whole = COMPRESS[ending](content)
    expected = documents(whole)
    assert expected

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(CHANGES)
    def check(change):
        other = changed(whole, *change)
        try:
            found = documents(other)
        except UserError as error:
            message = str(error)
            assert "\n" not in message.strip()
            assert path.stem.partition(".")[0] in message
        else:
            confirmed = ending or name == "parquet, checked"
            added = other.startswith(whole) or not other  # a second member, or no bytes at all
            assert (found == expected) or not confirmed or added

    check()
