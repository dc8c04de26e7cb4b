"""Sources by URL: read like local files, despite failures; impossible ones give one line."""

import bz2
import gzip
import json
import socket
from http.server import BaseHTTPRequestHandler

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from served import running, served, served_in_order

from lm.data import file_parts, remote
from lm.data.dataset import open_corpus
from lm.data.records import open_records
from lm.errors import UserError

ROWS = [{"text": f"text {i}\n" * (i % 7), "label": str(i)} for i in range(400)]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(remote, "_listed", {})
    monkeypatch.setattr(remote, "_FIRST_DELAY", 0.01)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    (folder / "f.jsonl").write_bytes(lines)
    (folder / "f.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "f.txt.bz2").write_bytes(bz2.compress("größer\n".encode() * 9))
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, folder / "f.parquet", row_group_size=90)
    with pa.ipc.new_stream(folder / "f.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=90)
    (folder / "f.tsv").write_text("text\tlabel\na\t1\nb\t2\n")
    return folder


SPECS = ["jsonl:{}/f.jsonl", "jsonl:{}/f.jsonl.gz", "text:{}/f.txt.bz2", "parquet:{}/f.parquet"]
SPECS += ["arrow:{}/f.arrow"]


def _chunks(spec, data):
    return list(open_corpus(spec, data, "train").chunks())


def _require_same(folder, address, make_data):
    for spec in SPECS:
        local = open_corpus(spec.format(folder), make_data(), "train")
        away = open_corpus(spec.format(address), make_data(), "train")
        assert list(away.chunks()) == list(local.chunks())
        assert away.digest == local.digest
        parts = [chunk for part in away.parts() for chunk in part.chunks()]
        assert parts == list(local.chunks())
    first, second = (
        [record for record, _ in open_records(f"tsv:{place}/f.tsv", make_data(labels="1,2"))]
        for place in (folder, address)
    )
    assert first == second
    relative = make_data(directory=str(address))
    assert _chunks("jsonl:f.jsonl", relative) == _chunks(f"jsonl:{folder}/f.jsonl", make_data())


def test_files_of_a_server_match_the_folder(make_data, folder):
    with served(folder) as server:
        _require_same(folder, server.url, make_data)


def test_ranges_of_lines_are_read_alone(make_data, folder, monkeypatch):
    monkeypatch.setattr(file_parts, "RANGE", 5000)
    with served(folder) as server:
        corpus = open_corpus(f"jsonl:{server.url}/f.jsonl", make_data(), "train")
        parts = corpus.parts()
        assert len(parts) > 2
        assert [chunk for part in parts for chunk in part.chunks()] == list(corpus.chunks())


def test_server_without_ranges_that_lists_its_files(make_data, folder, monkeypatch):
    monkeypatch.setattr(remote, "_BLOCK", 1000)
    with served_in_order(folder) as url:
        away = _chunks(f"jsonl:{url}/f.json*", make_data())
        assert away == _chunks(f"jsonl:{folder}/f.json*", make_data())
        assert len(away) > 400
        with pytest.raises(UserError, match="does not support range requests"):
            _chunks(f"parquet:{url}/f.parquet", make_data())


def test_server_that_tells_no_length(make_data, folder):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write((folder / self.path[1:]).read_bytes())

        def log_message(self, *args):
            pass

    with running(Handler) as url:
        away = _chunks(f"jsonl:{url}/f.jsonl", make_data())
        assert away == _chunks(f"jsonl:{folder}/f.jsonl", make_data())
        with pytest.raises(UserError, match="does not report its size"):
            _chunks(f"parquet:{url}/f.parquet", make_data())


@pytest.mark.parametrize("spec", SPECS)
def test_reading_resumes_after_failures(make_data, folder, spec):
    wanted = _chunks(spec.format(folder), make_data())
    with served(folder) as server:
        corpus = open_corpus(spec.format(server.url), make_data(), "train")
        server.drops = 3
        assert list(corpus.chunks()) == wanted
        assert server.drops == 0


@pytest.mark.parametrize("status", [403, 404, 500])
def test_permanent_failures_are_one_line_errors(make_data, folder, status):
    with served(folder) as server:
        corpus = open_corpus(f"jsonl:{server.url}/f.jsonl", make_data(), "train")
        server.status = status
        with pytest.raises(UserError) as error:
            list(corpus.chunks())
        assert str(error.value).startswith(f"{server.url}/f.jsonl: ")
        assert "\n" not in str(error.value)
        words = "no file matches" if status == 404 else "cannot be read"
        with pytest.raises(UserError, match=words):
            open_corpus(f"text:{server.url}/f.txt", make_data(), "train")


@pytest.mark.parametrize("spec", SPECS)
def test_files_that_end_early_or_change_are_one_line_errors(make_data, folder, spec):
    with served(folder) as server:
        corpus = open_corpus(spec.format(server.url), make_data(), "train")
        server.missing = 9
        with pytest.raises(UserError) as error:
            list(corpus.chunks())
        assert "\n" not in str(error.value)
        server.missing = 0
        list(corpus.chunks())
        server.version = 1
        with pytest.raises(UserError, match="changed while it was read"):
            list(corpus.chunks())
        path = folder / spec.partition("/")[2]
        path.unlink()
        with pytest.raises(UserError, match="was removed"):
            list(corpus.chunks())


def test_queries_are_not_part_of_the_name(make_data, folder):
    with served(folder) as server:
        plain = open_corpus(f"jsonl:{server.url}/f.jsonl.gz", make_data(), "train")
        signed = open_corpus(f"jsonl:{server.url}/f.jsonl.gz?token=1", make_data(), "train")
        assert list(signed.chunks()) == list(plain.chunks())
        assert signed.digest == plain.digest


def test_invalid_addresses(make_data, folder):
    for address, words in {
        "ftp://host/f": r"unknown URL scheme \(known: gs://",
        "http://127.0.0.1:9/f": "cannot be read",
    }.items():
        with pytest.raises(UserError, match=words) as error:
            open_corpus(f"text:{address}", make_data(), "train")
        assert "\n" not in str(error.value)


def test_bucket_of_google(make_data, folder):
    from emulated_bucket import emulated_bucket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with emulated_bucket("corpora", port) as address:
        import gcsfs

        gcsfs.GCSFileSystem.clear_instance_cache()
        fs = gcsfs.GCSFileSystem(token="anon")
        for path in folder.iterdir():
            fs.pipe_file(f"corpora/a/{path.name}", path.read_bytes())
        _require_same(folder, f"{address}/a", make_data)
        glob = _chunks(f"jsonl:{address}/a/f.json*", make_data())
        assert glob == _chunks(f"jsonl:{folder}/f.json*", make_data())
        for spec, words in {
            f"text:{address}/b/*.txt": "no file matches",
            f"text:{address}/a": "is a folder",
            "text:gs://elsewhere/*.txt": "bucket 'elsewhere' does not exist",
            "text:gs://elsewhere/x.txt": "bucket 'elsewhere' does not exist",
        }.items():
            with pytest.raises(UserError, match=words):
                open_corpus(spec, make_data(), "train")
        corpus = open_corpus(f"jsonl:{address}/a/f.jsonl", make_data(), "train")
        fs.pipe_file("corpora/a/f.jsonl", b'{"text": "new"}\n')
        with pytest.raises(UserError, match="changed while it was read"):
            list(corpus.chunks())


def test_bucket_of_amazon(make_data, folder, monkeypatch):
    s3fs = pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        fs = s3fs.S3FileSystem()
        fs.mkdir("corpora")
        for path in folder.iterdir():
            fs.pipe_file(f"corpora/a/{path.name}", path.read_bytes())
        _require_same(folder, "s3://corpora/a", make_data)
        glob = _chunks("jsonl:s3://corpora/a/f.json*", make_data())
        assert glob == _chunks(f"jsonl:{folder}/f.json*", make_data())
        for spec, words in {
            "text:s3://corpora/b/*.txt": "no file matches",
            "text:s3://corpora/a": "is a folder",
            "text:s3://elsewhere/*.txt": "bucket 'elsewhere' does not exist",
        }.items():
            with pytest.raises(UserError, match=words):
                open_corpus(spec, make_data(), "train")
        corpus = open_corpus("jsonl:s3://corpora/a/f.jsonl", make_data(), "train")
        fs.pipe_file("corpora/a/f.jsonl", b'{"text": "new"}\n')
        with pytest.raises(UserError, match="changed while it was read"):
            list(corpus.chunks())
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(UserError, match="log in"):
            open_corpus("text:s3://corpora/a/f.jsonl", make_data(), "train")
    finally:
        server.stop()
