"""Web archives: texts of WET files and responses; damage gives a one-line error."""

import gzip

import pytest

from lm.data.dataset import open_corpus
from lm.errors import UserError

HTML = (
    "<html><head><title>T</title><script>x = 1</script></head><body><nav><a href=/>menu</a></nav>"
    "<article><p>Größe &amp; mehr, in einem ganzen Satz.</p></article></body></html>"
)


def record(kind, body, content_type="text/plain"):
    """A record, as ISO 28500 has it."""
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:uuid:1>\r\n"
        f"WARC-Target-URI: http://x/\r\nWARC-Date: 2020-01-01T00:00:00Z\r\n"
        f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body + b"\r\n\r\n"


def response(body, content_type, more="", status="200 OK"):
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\n{more}\r\n".encode()
    return record("response", head + body, "application/http; msgtype=response")


def texts(make_data, spec):
    return [chunk.text for chunk in open_corpus(spec, make_data(), "train").chunks()]


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_texts_of_conversions_and_responses(make_data, tmp_path, ending):
    records = [
        record("warcinfo", b"software: x\r\n"),
        response(HTML.encode("latin-1"), "text/html; charset=iso-8859-1"),
        response(gzip.compress(HTML.encode()), "text/html", "Content-Encoding: gzip\r\n"),
        response("schlicht é".encode(), "text/plain; charset=utf-8"),
        response(b"\x89PNG", "image/png"),
        response(b"<p>not found</p>", "text/html", status="404 Not Found"),
        record("conversion", "Größe\nzwei\n".encode()),
        record("conversion", b" \n"),
    ]
    members = map(gzip.compress, records) if ending else records
    (tmp_path / f"f.warc{ending}").write_bytes(b"".join(members))
    page = "Größe & mehr, in einem ganzen Satz."
    assert texts(make_data, f"warc:f.warc{ending}") == [page, page, "schlicht é", "Größe\nzwei\n"]


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_cut_and_other_files_are_one_line_errors(make_data, tmp_path, ending):
    compress = gzip.compress if ending else bytes
    records = [record("conversion", f"text {i}".encode()) for i in range(3)]
    whole = b"".join(compress(one) for one in records)
    path = tmp_path / f"f.wet{ending}"
    for content in (whole[:-8], whole[:-40], b"<html>not an archive</html>" * 9):
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            texts(make_data, f"warc:f.wet{ending}")
        assert f"{path}: " in str(error.value)
        assert "\n" not in str(error.value)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="contains no text"):
        texts(make_data, f"warc:f.wet{ending}")
