"""`lm data build`, `show` and `verify`, of stores of one piece, in shards, and of records."""

import json
import os

import pytest

from lm.cli import main
from lm.data import dataset, file_parts, sharded_store
from lm.data.shared_folder import open_shared_folder
from lm.errors import UserError


@pytest.fixture(params=["whole", "shards", "records"])
def kind(request, monkeypatch, make_kind, tmp_path):
    """A kind of store, and the words that name its configuration."""
    if request.param == "shards":
        monkeypatch.setattr(dataset, "ONE_STORE", 0)
        monkeypatch.setattr(file_parts, "RANGE", 2000)
        monkeypatch.setattr(sharded_store, "SHARD", 3000)
    name = "classification encoder" if request.param == "records" else "causal decoder"
    config = make_kind(name, data__cache_directory=str(tmp_path / "cache"))
    if request.param == "shards":  # a file this new is known by its contents, later by its time
        os.utime(config.data.source.partition(":")[2], ns=(10**18, 10**18))
    file = tmp_path / "kind.py"
    lines = ["import json", "from ml_collections import ConfigDict", "def get_config():"]
    lines += [f"    config = ConfigDict(json.loads({config.to_json()!r}))"]
    lines += ["    config.data.weights = ()", "    return config"]
    file.write_text("\n".join(lines))
    return request.param, file


def run(capsys, *words):
    code = main(list(map(str, words)))
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return code, printed.out, printed.err


def test_data_are_built_shown_and_verified(kind, capsys, tmp_path):
    name, file = kind
    code, out, err = run(capsys, "data", "build", "--config", file)
    assert (code, len(out.splitlines())) == (0, 2), err
    assert out.startswith("train: ")
    built = json.loads(run(capsys, "data", "build", "--config", file, "--json")[1])
    assert [row["split"] for row in built] == ["train", "validation"]

    code, out, _ = run(capsys, "data", "show", "--config", file, "--samples", "2")
    assert code == 0
    assert out.count("  > ") == 4
    assert "median" in out
    picture = tmp_path / "data.png"
    words = ["data", "show", "--config", file, "--json", "--picture", picture]
    shown = json.loads(run(capsys, *words)[1])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [row["sizes"]["tokens"] for row in shown] == [row["tokens"] for row in built]
    assert (shown[0]["n_shards"] > 1) == (name == "shards")
    lengths = next(iter(shown[0]["lengths"].values()))
    assert 0 < lengths["least"] <= lengths["median"] <= lengths["most"]
    assert len(shown[0]["samples"]) == 3
    if name != "records":
        assert shown[0]["sizes"]["documents"] == 32
        assert "model" in " ".join(shown[0]["frequent"])

    code, out, err = run(capsys, "data", "verify", "--config", file)
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == (1 if name == "records" else 2)


@pytest.mark.parametrize("kind", ["shards"], indirect=True)
def test_damaged_shard_is_named_and_built_again_alone(kind, capsys, tmp_path):
    _, file = kind
    run(capsys, "data", "build", "--config", file)
    paths = sorted((tmp_path / "cache" / "stores").glob("*.shards/00001.shard"))
    before = [path.read_bytes() for path in paths]
    others = [path.stat().st_ino for path in paths[0].parent.glob("00000.shard")]
    for byte, damage in ((3, "does not match its checksum"), (-10, "its index is not valid")):
        content = bytearray(before[0])
        content[byte] ^= 1
        paths[0].write_bytes(content)
        code, _, err = run(capsys, "data", "verify", "--config", file)
        assert code == 2
        assert "00001.shard" in err
        assert damage in err
        assert "shards/00001.shard, so that it is rebuilt" in err
    paths[0].unlink()
    code, _, err = run(capsys, "data", "build", "--config", file)
    assert "1 shards are missing or damaged: building them again" in err
    assert [path.read_bytes() for path in paths] == before
    assert [path.stat().st_ino for path in paths[0].parent.glob("00000.shard")] == others
    assert run(capsys, "data", "verify", "--config", file)[0] == 0


def test_cache_that_cannot_be_reached_is_a_one_line_error():
    with pytest.raises(UserError, match=r"ftp://127\.0\.0\.1:1/x: "):
        open_shared_folder("ftp://127.0.0.1:1/x")


def test_picture_of_another_kind_is_a_one_line_error(kind, capsys, tmp_path):
    code, _, err = run(capsys, "data", "show", "--config", kind[1], "--picture", "data.tiff")
    assert code == 2
    assert "end in .png or .svg" in err
