"""`lm data verify` reads whole stores and names what is damaged."""

import json
import zlib

import numpy as np
import pytest

from lm.cli import main
from lm.data import store, verification
from lm.data.dataset import open_dataset


@pytest.fixture(params=["causal decoder", "classification encoder"])
def opened(request, make_kind, tmp_path, monkeypatch):
    """An experiment file, its configuration and the folder of one of its stores."""
    for module in (store, verification):
        monkeypatch.setattr(module, "BLOCK", 256)
    config = make_kind(request.param, data__cache_directory=str(tmp_path / "cache"))
    columns = ("text",) if request.param.startswith("class") else ()
    dataset = open_dataset(config.data, columns)
    file = tmp_path / "kind.py"
    lines = ["import json", "from ml_collections import ConfigDict", "def get_config():"]
    lines += [f"    config = ConfigDict(json.loads({config.to_json()!r}))"]
    lines += ["    config.data.weights = ()", "    return config"]
    file.write_text("\n".join(lines))
    return file, config, dataset.train[0].directory


def verify(capsys, *words):
    code = main(["data", "verify", *map(str, words)])
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return code, printed.out, printed.err


def test_whole_stores_are_as_they_were_written(opened, capsys):
    file, config, folder = opened
    code, out, _ = verify(capsys, "--config", file)
    assert code == 0
    assert str(folder) in out
    code, out, _ = verify(
        capsys, f"--config.data.cache_directory={config.data.cache_directory}", "--json"
    )
    assert code == 0
    assert str(folder) in {row["folder"] for row in json.loads(out)}


def test_damaged_block_is_named(opened, capsys):
    file, _, folder = opened
    name = next(n for n in ("tokens.bin", "text.bin") if (folder / n).is_file())
    whole = (folder / name).read_bytes()
    flipped = bytearray(whole)
    flipped[256 + 7] ^= 1
    damages = {
        f"{name}: block 1 (bytes 256 to ": bytes(flipped),
        f"{name}: block 0 (bytes 0 to 256) does not match its checksum": bytes(len(whole)),
        f"{name} has 1 blocks instead of": whole[:256],
    }
    for expected, content in damages.items():
        (folder / name).write_bytes(content)
        code, _, err = verify(capsys, "--config", file)
        assert code == 2
        assert f"{folder}: {expected}" in err
        assert err.splitlines()[-1].startswith("error: 1 of ")
    (folder / name).write_bytes(whole)
    assert verify(capsys, "--config", file)[0] == 0
    (folder / "other.bin").write_bytes(b"x")
    assert "other.bin was added" in verify(capsys, "--config", file)[2]


def test_ids_beyond_the_vocabulary_are_named(opened, capsys):
    file, _, folder = opened
    name = next(n for n in ("tokens.bin", "text.bin") if (folder / n).is_file())
    manifest = json.loads((folder / "manifest.json").read_text())
    tokens = np.fromfile(folder / name, manifest["dtype"])
    tokens[3] = 60_000
    tokens.tofile(folder / name)
    manifest["checksums"][name][0] = zlib.crc32(tokens.tobytes()[:256])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    code, _, err = verify(capsys, "--config", file)
    assert code == 2
    assert f"{name}: block 0 (bytes 0 to 256) has 1 token ids beyond the vocabulary of" in err
    assert "such as 60000" in err


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"checksums": 3, "n_tokens": 1}', "[" * 9999])
def test_damaged_manifest_is_a_one_line_error(opened, capsys, content):
    file, _, folder = opened
    (folder / "manifest.json").write_text(content)
    code, _, err = verify(capsys, "--config", file)
    assert code == 2
    assert f"{folder}: manifest.json is damaged" in err


def test_without_a_store_a_line_says_so(tmp_path, capsys):
    code, out, _ = verify(capsys, f"--config.data.cache_directory={tmp_path}")
    assert code == 0
    assert "no stores yet" in out
