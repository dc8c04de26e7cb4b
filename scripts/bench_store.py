"""Measure stores of large corpora: memory and time of a build, start-up, and scaling.

    python scripts/bench_store.py [--megabytes 200 2000] [--tokenizer byte] [--folder DIR]

makes a corpus of JSON lines of each size in a new folder below --folder, 25 MB a file, and prints
for each
    build     seconds and MB/s with one and with two processes, and their ratio
    memory    largest resident size of any process, and of the main one
    start     seconds to open a store that is there, of `open_dataset` alone

Each in processes of its own, through `lm data build`.
"""

import argparse
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
    """Write documents of words with the frequencies of a language, always the same."""
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
    """Return the resident sizes, in MB, of a process and those below it."""
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


def build(experiment, cache, workers):
    """Build a store; return seconds and the largest resident sizes of main and any process."""
    shutil.rmtree(cache, ignore_errors=True)
    words = [sys.executable, "-m", "lm", "data", "build", "--config", experiment, "--json"]
    words += [f"--config.data.cache_directory={cache}", f"--config.data.workers={workers}"]
    began, main, most = time.perf_counter(), 0.0, 0.0
    with subprocess.Popen(list(map(str, words)), stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            sizes = resident(process.pid)
            main, most = max(main, *sizes[:1], 0.0), max(most, *sizes, 0.0)
            time.sleep(0.1)
    assert process.returncode == 0
    return time.perf_counter() - began, main, most


def start(experiment, cache):
    """Return the median seconds of opening the store."""
    words = [sys.executable, "-c", OPEN, str(experiment), str(cache)]
    return sorted(float(subprocess.check_output(words)) for _ in range(3))[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[200, 2000])
    parser.add_argument("--tokenizer", default="byte")
    parser.add_argument("--folder", default=tempfile.gettempdir())
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench_store_", dir=args.folder))
    for megabytes in args.megabytes:
        corpus, cache = folder / f"{megabytes}", folder / "cache"
        make_corpus(corpus, megabytes)
        experiment = folder / "experiment.py"
        experiment.write_text(EXPERIMENT.format(folder=corpus, tokenizer=args.tokenizer))
        size = sum(path.stat().st_size for path in corpus.iterdir()) / 1e6
        one, *_ = build(experiment, cache, 1)
        two, main_size, most = build(experiment, cache, 2)
        row = {"MB": round(size), "seconds, 1": round(one, 1), "seconds, 2": round(two, 1)}
        row |= {"MB/s, 1": round(size / one, 1), "scaling": round(one / two, 2)}
        row |= {"main MB": round(main_size), "most MB": round(most)}
        print(json.dumps(row | {"start": round(start(experiment, cache), 2)}), flush=True)
        shutil.rmtree(corpus)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
