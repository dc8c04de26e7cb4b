"""`lm data clean` finds unneeded cache files, and removes only the cache's own."""

import json
import os
import shutil
from pathlib import Path

import pytest

from lm.cli import main
from lm.data import dataset, file_parts, sharded_store
from lm.storage import lock
from lm.storage.bucket import machine_name

OLD = 10**9  # seconds since the epoch
KEYS = [f"{i:032x}" for i in range(16)]


@pytest.fixture(params=["whole", "shards", "records"])
def built(request, monkeypatch, make_kind, tmp_path, capsys):
    """Return a kind of store, its experiment file, its source, and its built, old cache."""
    if request.param == "shards":
        monkeypatch.setattr(dataset, "ONE_STORE", 0)
        monkeypatch.setattr(file_parts, "RANGE", 2000)
        monkeypatch.setattr(sharded_store, "SHARD", 3000)
    name = "classification encoder" if request.param == "records" else "causal decoder"
    config = make_kind(name, data__cache_directory=str(tmp_path / "cache"))
    kind, _, path = config.data.source.partition(":")
    source = Path(shutil.copy(path, tmp_path / Path(path).name))
    os.utime(source, (OLD, OLD))
    config.data.source = f"{kind}:{source}"
    file = tmp_path / "kind.py"
    lines = ["import json", "from ml_collections import ConfigDict", "def get_config():"]
    lines += [f"    config = ConfigDict(json.loads({config.to_json()!r}))"]
    lines += ["    config.data.weights = ()", "    return config"]
    file.write_text("\n".join(lines))
    assert main(["data", "build", "--config", str(file)]) == 0
    capsys.readouterr()
    make_old(tmp_path / "cache")
    return request.param, file, source, tmp_path / "cache"


def make_old(*places):
    for place in places:
        for path in [*place.rglob("*"), place]:
            os.utime(path, (OLD, OLD), follow_symlinks=False)


def clean(capsys, *words, code=0):
    assert main(["data", "clean", *map(str, words)]) == code
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == (code != 0)
    return printed.err if code else printed.out


def rows_of(capsys, *words):
    return {row["folder"]: row for row in json.loads(clean(capsys, *words, "--json"))}


def tree(*places):
    return {str(path): path.lstat().st_mtime for place in places for path in place.rglob("*")}


def make(cache, *files):
    """Make files below the cache, old; return their folders."""
    folders = []
    for name in files:
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_bytes(b"12345678")
        folders.append((cache / name).parent)
        make_old(folders[-1])
    return folders


def test_cache_in_use_is_needed(built, capsys):
    _, file, _, cache = built
    kept = tree(cache / "stores", cache / "records")
    for words in ([f"--config.data.cache_directory={cache}"], ["--config", file]):
        found = rows_of(capsys, *words, "--delete")
        assert {Path(name).suffix for name in found} <= {".counts"}  # of documents, for held-out
    after = tree(cache / "stores", cache / "records")
    assert {n for n in kept if ".counts" not in n} == {n for n in after if ".counts" not in n}


def test_leftovers_are_listed_and_then_removed(tmp_path, capsys):
    cache = tmp_path / "cache"
    (cache / "records").mkdir(parents=True)
    (cache / "records" / f"{KEYS[5]}.lock").touch()
    folders = make(
        cache,
        f"stores/{KEYS[1]}.shards/00000.shard",
        f"stores/{KEYS[2]}.shards/.{KEYS[0]}.00001.shard.tmp",
        f"stores/{KEYS[3]}.counts/00000.json",
        f"records/{KEYS[5]}.partial/text.bin",
    )
    word = f"--config.data.cache_directory={cache}"
    before = tree(cache)
    out = clean(capsys, word)
    assert tree(cache) == before
    assert out.splitlines()[-1] == "4 folders, 32 bytes: not needed; --delete removes them"
    found = rows_of(capsys, word, "--delete")
    assert set(found) == {str(folder) for folder in folders}
    assert all(row["removed"] and row["bytes"] == 8 for row in found.values())
    assert not any(folder.exists() for folder in folders)
    assert "no unneeded folders" in clean(capsys, word)


def test_stores_of_a_changed_source_are_not_needed(built, capsys):
    kind, file, source, cache = built
    old = set(cache.glob("records/*" if kind == "records" else "stores/*"))
    lines = source.read_bytes().splitlines(keepends=True)
    source.write_bytes(b"".join([*lines, lines[-2]]))
    os.utime(source, (OLD + 9, OLD + 9))
    assert main(["data", "build", "--config", str(file)]) == 0
    new = set(cache.glob("*/*")) - old
    make_old(cache)
    capsys.readouterr()
    assert not rows_of(capsys, f"--config.data.cache_directory={cache}").keys() - {
        str(path) for path in cache.glob("stores/*.counts")
    }
    found = rows_of(capsys, "--config", file, "--delete")
    assert any(str(source) in row["reason"] for row in found.values())
    names = {path for path in old if path.suffix != ".lock" and path.name != "by_name"}
    assert not any(path.exists() for path in names)
    assert all(path.exists() for path in new if path.suffix != ".counts")
    assert len(list(cache.glob("stores/by_name/*"))) == (2 if kind == "shards" else 0)


@pytest.mark.parametrize(
    "why", ["recent", "future", "claimed", "locked", "no manifest", "no store"]
)
def test_files_in_use_are_kept(why, tmp_path, capsys):
    cache = tmp_path / "cache"
    name = f"stores/{KEYS[1]}.{'partial' if why == 'locked' else 'shards'}"
    (folder,) = make(cache, f"{name}/00000.shard")
    (cache / f"stores/{KEYS[1]}.lock").touch()
    if why in ("recent", "future"):
        os.utime(folder / "00000.shard", (2**32, 2**32) if why == "future" else None)
    if why == "claimed":
        claim = {"machine": machine_name(), "process": os.getpid()}
        (folder / "00001.shard.claim").write_text(json.dumps(claim))
        make_old(folder)
    if why == "no manifest":
        make(cache, f"stores/{KEYS[2]}/manifest.json")
    if why == "no store":  # that can be read
        (cache / f"stores/{KEYS[2]}").symlink_to(KEYS[2])
    words = [f"--config.data.cache_directory={cache}", "--delete"]
    with lock(cache / f"stores/{KEYS[1 if why == 'locked' else 2]}.lock"):
        (row,) = rows_of(capsys, *words).values()
    assert row["kept"]
    assert folder.exists()


def test_foreign_files_are_not_touched(tmp_path, capsys):
    cache, other = tmp_path / "cache", tmp_path / "other"
    make(other, f"{KEYS[1]}.shards/00000.shard", f"{KEYS[2]}.partial/a", "00000.shard")
    (other / f"{KEYS[2]}.lock").touch()
    make(
        cache,
        f"stores/{KEYS[3]}.shards/notes.txt",
        f"stores/{KEYS[4]}.shards/more/00000.shard",
        "stores/photos.shards/00000.shard",
        f"stores/{KEYS[5]}.x.shards/00000.shard",
        f"stores/{KEYS[6]}.partial/without_a_lock",
        f"projects/{KEYS[7]}.shards/00000.shard",
        f"{KEYS[7]}.shards/00000.shard",
    )
    (cache / f"stores/{KEYS[8]}.shards").symlink_to(other / f"{KEYS[1]}.shards")
    (cache / f"stores/{KEYS[9]}.shards").mkdir()
    (cache / f"stores/{KEYS[9]}.shards/00000.shard").symlink_to(other / "00000.shard")
    (cache / f"stores/{KEYS[10]}.shards").touch()
    (cache / "records").symlink_to(other)
    make_old(cache, other)
    before = tree(cache, other)
    found = rows_of(capsys, f"--config.data.cache_directory={cache}", "--delete")
    assert all(row["kept"] and not row["removed"] for row in found.values())
    assert tree(cache, other) == before


def test_cache_that_cannot_be_cleaned_is_a_one_line_error(tmp_path, capsys):
    err = clean(capsys, "--config.data.cache_directory=gs://bucket/cache", code=2)
    assert "gs://bucket/cache/stores" in err
    clean(capsys, "--config", tmp_path / "none.py", code=2)
    assert "no unneeded folders" in clean(
        capsys, f"--config.data.cache_directory={tmp_path / 'none'}"
    )
