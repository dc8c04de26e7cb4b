"""Measure token stores of large corpora: memory and time of a build, start-up, and scaling.

    python scripts/bench_store.py [--megabytes 200 2000] [--tokenizer byte] [--folder DIR] [--kill]

For each size, it creates a corpus of JSON lines in a new folder in --folder, with 25 MB per file,
and prints
    build     seconds and MB/s with one and with two processes, and their ratio
    memory    peak resident memory of any process, and of the main one
    start     seconds that `open_dataset` takes to open an existing store

Each measurement runs `lm data build` in separate processes. With --kill, a build with two processes
instead gets SIGKILL after half of its usual time, is continued, and then started once more; it
prints the seconds, the largest process and the new shards of each start. The exit code is 1 if a
finished shard is built again, or if one differs from those of an undisturbed build.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FILE = 25 * 10**6  # bytes
EXPERIMENT = """
from lm.config import default

def get_config():
    config = default()
    config.data.source, config.data.tokenizer = "jsonl:{folder}/*.jsonl", "{tokenizer}"
    return config
"""
OPEN = """
import sys, time
from lm import config as configs
from lm.data.dataset import open_dataset
data = configs.load_config(sys.argv[1], {"data.cache_directory": sys.argv[2]}).data
began = time.perf_counter()
open_dataset(data)
print(time.perf_counter() - began)
"""


def make_corpus(folder, megabytes):
    """Write deterministic documents with the word frequencies of a language."""
    folder.mkdir()
    rng = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = [
        "".join(rng.choices(letters, range(26, 0, -1), k=rng.randint(2, 9))) for _ in range(9999)
    ]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    block = [" ".join(rng.choices(words, weights, k=rng.randint(20, 600))) for _ in range(2000)]
    for number in range(max(megabytes * 10**6 // FILE, 1)):
        with open(folder / f"{number:04d}.jsonl", "w") as file:
            row = 0
            while file.tell() < FILE:
                text = f"{number} {row} {block[(row * 7 + number) % len(block)]}"
                file.write(json.dumps({"text": text}) + "\n")
                row += 1
    for path in folder.iterdir():
        os.utime(path, (10**9, 10**9))


def resident(pid):
    """Return the resident sizes, in MB, of a process and its descendants."""
    sizes, waiting = [], [pid]
    while waiting:
        pid = waiting.pop(0)
        try:
            fields = dict(
                line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            )
            sizes.append(int(fields["VmHWM"].split()[0]) / 1000)
            for task in Path(f"/proc/{pid}/task").iterdir():
                waiting += (task / "children").read_text().split()
        except (OSError, KeyError):
            continue
    return sizes


def build(experiment, cache, workers, kill_after=float("inf")):
    """Build a store or kill the build; return seconds and peak sizes of main and any process."""
    words = [sys.executable, "-m", "lm", "data", "build", "--config", experiment, "--json"]
    words += [f"--config.data.cache_directory={cache}", f"--config.data.workers={workers}"]
    began, main, most = time.perf_counter(), 0.0, 0.0
    with subprocess.Popen(list(map(str, words)), stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            sizes = resident(process.pid)
            main, most = max(main, *sizes[:1], 0.0), max(most, *sizes, 0.0)
            time.sleep(0.1)
            if time.perf_counter() - began > kill_after:
                process.kill()
    assert process.returncode == (0 if kill_after == float("inf") else -9)
    return time.perf_counter() - began, main, most


def shards(cache):
    """Return identity and checksum of the shards in a cache, by name."""
    found = {}
    for path in sorted(cache.glob("stores/*.shards/*.shard")):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[path.relative_to(cache)] = path.stat().st_ino, digest
    return found


def kill(experiment, cache):
    """Build a complete store and one that is killed, continued and started again; print both."""
    whole, _, most = build(experiment, cache, 2)
    expected = {name: digest for name, (_, digest) in shards(cache).items()}
    row = {"whole": round(whole, 1), "most MB": round(most), "shards": len(expected)}
    shutil.rmtree(cache)
    made, kept = {}, True
    for name, seconds in (
        ("killed", whole / 2),
        ("continued", float("inf")),
        ("again", float("inf")),
    ):
        taken, _, most = build(experiment, cache, 2, seconds)
        before, made = made, shards(cache)
        kept &= before.items() <= made.items()
        row[name] = f"{taken:.1f} s, {most:.0f} MB, {len(made) - len(before)} shards"
    same = {name: digest for name, (_, digest) in made.items()} == expected
    print(json.dumps(row | {"finished ones kept": kept, "the same": same}), flush=True)
    return kept and same


def start(experiment, cache):
    """Return the median seconds of opening the store."""
    words = [sys.executable, "-c", OPEN, str(experiment), str(cache)]
    return sorted(float(subprocess.check_output(words)) for _ in range(3))[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[200, 2000])
    parser.add_argument("--tokenizer", default="byte")
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--kill", action="store_true", help="kill builds instead")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench_store_", dir=args.folder) as folder:
        sys.exit(0 if measure(args, Path(folder)) else 1)


def measure(args, folder):
    """Print a row for each size; return whether all results are as expected."""
    good = True
    for megabytes in args.megabytes:
        corpus, cache = folder / f"{megabytes}", folder / "cache"
        make_corpus(corpus, megabytes)
        experiment = folder / "experiment.py"
        experiment.write_text(EXPERIMENT.format(folder=corpus, tokenizer=args.tokenizer))
        size = sum(path.stat().st_size for path in corpus.iterdir()) / 1e6
        if args.kill:
            print(json.dumps({"MB": round(size)}), flush=True)
            good &= kill(experiment, cache)
            shutil.rmtree(corpus)
            shutil.rmtree(cache)
            continue
        one, *_ = build(experiment, cache, 1)
        shutil.rmtree(cache)
        two, main_size, most = build(experiment, cache, 2)
        row = {"MB": round(size), "seconds, 1": round(one, 1), "seconds, 2": round(two, 1)}
        row |= {"MB/s, 1": round(size / one, 1), "scaling": round(one / two, 2)}
        row |= {"main MB": round(main_size), "most MB": round(most)}
        print(json.dumps(row | {"start": round(start(experiment, cache), 2)}), flush=True)
        shutil.rmtree(corpus)
        shutil.rmtree(cache)
    return good


if __name__ == "__main__":
    main()
