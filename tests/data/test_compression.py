"""Compressed files: all kinds read like the plain file; damage and wrong endings give one line."""

import bz2
import gzip
import io
import json
import lzma
import tarfile

import pytest
from backports import zstd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm.data import compression
from lm.data.dataset import open_corpus
from lm.data.files import read_bytes
from lm.data.records import open_records
from lm.errors import UserError

COMPRESS = {".gz": gzip.compress, ".zst": zstd.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
ENDINGS = sorted(COMPRESS)


def _read(path):
    return b"".join(read_bytes(path))


def _texts(spec, data):
    return [chunk.text for chunk in open_corpus(spec, data, "train").chunks()]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.binary(max_size=50) | st.binary(max_size=3).map(lambda b: b * 5000), max_size=4),
    st.sampled_from(ENDINGS),
    st.sampled_from([1, 7, 2**18]),
)
def test_members_are_concatenated_wherever_reads_fall(tmp_path, members, ending, block):
    (tmp_path / f"f{ending}").write_bytes(b"".join(map(COMPRESS[ending], members)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compression, "_READ", block)
        assert _read(tmp_path / f"f{ending}") == b"".join(members)


@pytest.mark.parametrize("ending", ENDINGS)
def test_documents_and_records_match_the_plain_file(make_data, tmp_path, ending):
    text = "größer\n" * 200_000  # more than one chunk, cut inside characters
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / f"a.txt{ending.upper()}").write_bytes(COMPRESS[ending](text.encode()))
    line = json.dumps({"text": text}).encode()
    (tmp_path / f"a.jsonl{ending}").write_bytes(COMPRESS[ending](line))
    plain = _texts("text:a.txt", make_data())
    assert len(plain) > 1
    assert _texts(f"text:a.txt{ending.upper()}", make_data()) == plain
    assert _texts(f"jsonl:a.jsonl{ending}", make_data()) == plain
    squad = {"data": [{"paragraphs": [{"context": "A b.", "qas": [{"id": "1", "question": "?"}]}]}]}
    squad["data"][0]["paragraphs"][0]["qas"][0]["answers"] = [{"text": "b", "answer_start": 2}]
    for kind, content in {
        "tsv": "text\tlabel\na\t1\n",
        "csv": 'text,label\n"a",1\n',
        "conll": "a 1\nb 0\n\n",
        "squad": json.dumps(squad),
        "parallel": "a b\nc\n",
    }.items():
        (tmp_path / kind).write_text(content)
        (tmp_path / f"{kind}{ending}").write_bytes(COMPRESS[ending](content.encode()))
        first, second = (
            [record for record, _ in open_records(f"{kind}:{names}", make_data())]
            for names in (
                (kind, f"{kind}{ending}")
                if kind != "parallel"
                else (f"{kind}|{kind}", f"{kind}{ending}|{kind}{ending}")
            )
        )
        assert first == second
        assert first


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("damage", ["cut", "head", "flip", "garbage", "second", "other", "plain"])
def test_damage_is_a_one_line_error_with_the_file(tmp_path, ending, damage):
    whole = COMPRESS[ending](bytes(range(256)) * 40)
    content = {
        "cut": whole[:-1],
        "head": whole[:3],
        "flip": whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:],
        "garbage": whole + b"garbage",
        "second": whole + whole[: len(whole) // 2],
        "other": COMPRESS[".gz" if ending != ".gz" else ".xz"](b"x"),
        "plain": b"A plain text." * 9,
    }[damage]
    if damage == "flip" and ending == ".zst":  # as the zstd program writes it; not by default here
        options = {zstd.CompressionParameter.checksum_flag: 1}
        whole = zstd.compress(bytes(range(256)) * 40, options=options)
        content = whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:]
    (tmp_path / f"f{ending}").write_bytes(content)
    with pytest.raises(UserError, match=rf"f\{ending}: damaged ") as error:
        _read(tmp_path / f"f{ending}")
    assert "\n" not in str(error.value)
    assert damage not in ("other", "plain") or "its content is" in str(error.value)


@pytest.mark.parametrize("ending", ENDINGS)
def test_empty_files_hold_no_text(make_data, tmp_path, ending):
    (tmp_path / f"a{ending}").write_bytes(b"")
    (tmp_path / f"b{ending}").write_bytes(COMPRESS[ending](b""))
    for name in "ab":
        with pytest.raises(UserError, match="contains no text"):
            open_corpus(f"text:{name}{ending}", make_data(), "train")


@pytest.mark.parametrize("ending", ENDINGS)
def test_plain_names_of_compressed_content_are_rejected(tmp_path, ending):
    (tmp_path / "f.txt").write_bytes(COMPRESS[ending](b"some text"))
    with pytest.raises(UserError, match=rf"f\.txt: compressed \(.*rename it to end in \{ending}"):
        _read(tmp_path / "f.txt")


def test_padding_is_allowed_where_the_format_has_it(tmp_path):
    for ending in (".gz", ".xz"):
        (tmp_path / f"f{ending}").write_bytes(COMPRESS[ending](b"text") + bytes(512))
        assert _read(tmp_path / f"f{ending}") == b"text"


def test_decompression_bomb_is_read_in_bounded_memory(tmp_path):
    for ending, compress in COMPRESS.items():
        (tmp_path / f"f{ending}").write_bytes(compress(bytes(2**25)))
        sizes = [len(chunk) for chunk in read_bytes(tmp_path / f"f{ending}")]
        assert sum(sizes) == 2**25
        assert max(sizes) <= 2**20


def test_windows_of_zstd_long_are_read(tmp_path):
    options = {zstd.CompressionParameter.window_log: 28}
    content = bytes(10_000)
    with zstd.open(tmp_path / "f.zst", "wb", options=options) as file:
        file.write(content)
    assert _read(tmp_path / "f.zst") == content


@pytest.mark.parametrize("kind", ["text", "jsonl"])
@pytest.mark.parametrize("ending", ["", ".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_archive_is_not_text(make_data, tmp_path, kind, ending, layout):
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=layout) as file:
        member = tarfile.TarInfo("a.txt")
        member.size = 5
        file.addfile(member, io.BytesIO(b"some\n"))
    content = archive.getvalue()
    (tmp_path / f"a.tar{ending}").write_bytes(COMPRESS.get(ending, bytes)(content))
    with pytest.raises(UserError, match=rf"a\.tar{ending}: is a tar archive: unpack it"):
        open_corpus(f"{kind}:a.tar{ending}", make_data(documents="line"), "train")
