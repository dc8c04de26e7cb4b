"""Benchmark tokenization and batches on this machine against other packages.

    python scripts/bench_data.py --data DIR [--folder FOLDER] [--megabytes 200] [--sample 24]
                                 [--only encode store batches] [--json]

DIR has GPT-2's own files gpt2_bpe/encoder.json and gpt2_bpe/vocab.bpe, and a model of 32,000
pieces, sentencepiece/mistral_v1.model. The corpus is created in FOLDER and is identical in every
run with the same Python installation: one document for each source file of the standard library and
the installed packages, in a fixed random order, and after every ten, one of generated text in many
scripts.

encode   tokens per second and core of `Tokenizer.encode_batch` on groups of documents as the store
         reads them, of `tokenizers` by document and in batches, of tiktoken, of
         SentencePiece's own batch call and of nanoGPT's prepare.py (`process` for each document).
         Seconds are CPU time of one core, so that other load matters little; the best of several
         rounds, in which all take turns. Ids are compared, document by document.
store    megabytes per second of building the token store of the whole corpus, including files,
         with one process and two, in wall-clock time; and likewise for nanoGPT's prepare.py.
batches  time that a training loop waits for its next batch, as a fraction of a step of 50 ms, and
         milliseconds per batch: windows of isolated documents, masked, span corruption.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

GROUP = 2**20  # characters, as the store groups documents
SCRIPTS = (
    *((0x61, 0x7B), (0xC0, 0x180), (0x391, 0x3CA), (0x410, 0x450), (0x5D0, 0x5EB), (0x627, 0x64B)),
    *((0x905, 0x93A), (0xE01, 0xE2F), (0x1E00, 0x1F00), (0x3041, 0x3097), (0x4E00, 0x9FA0)),
    *((0xAC00, 0xD7A4), (0x1F300, 0x1F650), (0x20000, 0x20200)),
)


def generated(rng: random.Random) -> str:
    """Return a document of about 4,000 words of one script, with numbers and punctuation."""
    low, high = rng.choice(SCRIPTS)
    words = [
        "".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(1, 9)))
        for _ in range(300)
    ]
    text = []
    for _ in range(4000):
        text.append(rng.choice(words) if rng.random() < 0.95 else str(rng.randrange(10**6)))
        text.append(
            rng.choices((" ", ", ", ". ", "\n", "\r\n", "  ", "\u3000"), (80, 6, 6, 5, 1, 1, 1))[0]
        )
    return "".join(text)


def documents() -> Iterator[str]:
    """Yield the documents of the corpus endlessly."""
    places = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    files = sorted({path for place in places for path in place.rglob("*.py")})
    rng = random.Random(0)
    rng.shuffle(files)
    while True:
        for number, path in enumerate(files):
            if text := path.read_bytes().decode(errors="replace"):
                yield text
            if number % 10 == 0:
                yield generated(rng)


def make_corpus(folder: Path, megabytes: int) -> Path:
    """Write the corpus as eight files of JSON lines, unless they exist."""
    folder = folder / f"corpus-{megabytes}"
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        size, number = 0, 0
        source = documents()
        for number in range(8):
            with open(partial / f"part{number}.jsonl", "w", encoding="utf-8") as file:
                while size < megabytes * 1e6 * (number + 1) / 8:
                    text = next(source)
                    size += len(text.encode())
                    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        partial.rename(folder)
    return folder


def read(folder: Path) -> Iterator[str]:
    """Yield the documents of a corpus."""
    for path in sorted(folder.glob("*.jsonl")):
        with open(path, encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)["text"]


def grouped(texts: list[str]) -> list[list[str]]:
    """Group texts as the store does for tokenization."""
    groups: list[list[str]] = [[]]
    for text in texts:
        groups[-1].append(text)
        if sum(map(len, groups[-1])) >= GROUP:
            groups.append([])
    return [group for group in groups if group]


# --- encode


def gpt2_encoding(data: Path):
    """Return tiktoken's Encoding of GPT-2, built from the vocabulary's own files."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks as load

    os.environ["TIKTOKEN_CACHE_DIR"] = ""  # no copies
    ranks = load(str(data / "gpt2_bpe/vocab.bpe"), str(data / "gpt2_bpe/encoder.json"))
    words = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    return tiktoken.Encoding(
        "gpt2", pat_str=words, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}
    )


def bpe_ways(data: Path) -> dict[str, Callable[[list[str]], list]]:
    """Return the ways to encode documents with GPT-2's vocabulary."""
    from lm.data.tokenizers.hf import Gpt2Tokenizer

    names = ("encoder.json", "vocab.bpe")
    ours = Gpt2Tokenizer(*((data / "gpt2_bpe" / name).read_bytes() for name in names))
    package, encoding = ours._tokenizer, gpt2_encoding(data)

    def in_batch(call: Callable) -> Callable[[list[str]], list]:
        return lambda texts: [found.ids for found in call(texts, add_special_tokens=False)]

    def prepare(texts: list[str]) -> list:
        # nanoGPT's data/openwebtext/prepare.py, process(example) and the write after it
        examples = []
        for text in texts:
            ids = encoding.encode_ordinary(text)
            ids.append(encoding.eot_token)
            examples.append({"ids": ids, "len": len(ids)})
        np.concatenate([np.array(example["ids"], np.uint16) for example in examples])
        return [example["ids"][:-1] for example in examples]

    return {
        "ours": lambda texts: [ids for group in grouped(texts) for ids in ours.encode_batch(group)],
        "tokenizers, a document at a time": lambda texts: [
            package.encode(text, add_special_tokens=False).ids for text in texts
        ],
        "tokenizers, encode_batch": in_batch(package.encode_batch),
        "tokenizers, encode_batch_fast": in_batch(package.encode_batch_fast),
        "tiktoken, encode_ordinary_batch": lambda texts: encoding.encode_ordinary_batch(
            texts, num_threads=1
        ),
        "nanoGPT's prepare.py": prepare,
    }


def piece_ways(data: Path) -> dict[str, Callable[[list[str]], list]]:
    """Return the ways to encode documents with a SentencePiece model of 32,000 pieces."""
    from lm.data.tokenizers.sentencepiece import SentencePieceTokenizer

    ours = SentencePieceTokenizer((data / "sentencepiece/mistral_v1.model").read_bytes())
    theirs = ours._processor
    return {
        "ours": lambda texts: [ids for group in grouped(texts) for ids in ours.encode_batch(group)],
        "sentencepiece, a document at a time": lambda texts: [theirs.encode(t) for t in texts],
        "sentencepiece, batch": lambda texts: theirs.encode(texts, num_threads=1),
    }


def byte_ways(data: Path) -> dict[str, Callable[[list[str]], list]]:
    """Return the ways to encode documents as bytes."""
    from lm.data.tokenizers.basic import ByteTokenizer

    ours = ByteTokenizer()
    return {
        "ours": lambda texts: [ids for group in grouped(texts) for ids in ours.encode_batch(group)],
        "np.frombuffer": lambda texts: [np.frombuffer(t.encode(), np.uint8) for t in texts],
    }


def bench_encode(folder: Path, data: Path, megabytes: int, rounds: int = 3) -> list[dict]:
    """Time each way on the first documents of the corpus, on one core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-1]})
    texts, size = [], 0
    for text in read(folder):
        texts.append(text)
        size += len(text.encode())
        if size >= megabytes * 1e6:
            break
    rows = []
    for kind, ways in (("gpt2", bpe_ways), ("sentencepiece 32k", piece_ways), ("byte", byte_ways)):
        found = ways(data)
        found["ours"](texts)  # prepares what it keeps
        seconds: dict[str, list[float]] = {name: [] for name in found}
        ids: dict[str, list] = {}
        for _ in range(rounds):
            for name, encode in found.items():
                start = time.process_time()
                result = encode(texts)
                seconds[name].append(time.process_time() - start)
                ids.setdefault(name, result)
        expected = [list(map(int, one)) for one in ids[list(found)[1]]]
        n_tokens = sum(map(len, expected))
        best = min(seconds["ours"])
        for name in found:
            same = all(list(map(int, a)) == b for a, b in zip(ids[name], expected, strict=True))
            rows.append(
                {
                    "tokenizer": kind,
                    "way": name,
                    "tokens_per_second": n_tokens / min(seconds[name]),
                    "megabytes_per_second": size / 1e6 / min(seconds[name]),
                    "ours_is_times": min(seconds[name]) / best,
                    "same_ids": same,
                }
            )
            print(shown(rows[-1]), file=sys.stderr)
    return rows


# --- store


def build(folder: Path, data: Path, tokenizer: str, workers: int, cache: str) -> None:
    """Build the store of a corpus, in a separate process."""
    from lm.config import default
    from lm.data.dataset import build_store, open_sources, open_tokenizer

    section = default().data
    section.source, section.tokenizer = f"jsonl:{folder}/*.jsonl", tokenizer
    section.validation_fraction = 0.0
    section.directory, section.workers, section.cache_directory = str(data), workers, cache
    (source,) = open_sources([section.source], section, "train", columns=())
    start = time.perf_counter()
    store = build_store(source, open_tokenizer(section), section, progress=False)
    print(json.dumps({"tokens": store.n_tokens, "seconds": time.perf_counter() - start}))


_encoding = None


def _start_prepare(data: Path) -> None:
    global _encoding
    _encoding = gpt2_encoding(data)


def _process(text: str) -> dict:
    ids = [*_encoding.encode_ordinary(text), 50256]
    return {"ids": ids, "len": len(ids)}


def prepare(folder: Path, data: Path, workers: int, output: Path) -> float:
    """Tokenize the corpus like nanoGPT's prepare.py, with a pool; return the seconds."""
    start = time.perf_counter()
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(workers, _start_prepare, (data,)) as pool, open(output, "wb") as file:
        for example in pool.imap(_process, read(folder), chunksize=16):
            file.write(np.array(example["ids"], np.uint16).tobytes())
    return time.perf_counter() - start


def bench_store(folder: Path, data: Path) -> list[dict]:
    """Time the building of stores with one process and two."""
    size = sum(len(text.encode()) for text in read(folder))
    rows = []
    ways = {
        "gpt2": "gpt2:gpt2_bpe",
        "sentencepiece 32k": "sentencepiece:sentencepiece/mistral_v1.model",
        "byte": "byte",
        "nanoGPT's prepare.py": None,
    }
    for name, tokenizer in ways.items():
        seconds = {}
        for workers in (1, 2):
            with tempfile.TemporaryDirectory() as cache:
                if tokenizer is None:
                    seconds[workers] = prepare(folder, data, workers, Path(cache, "out.bin"))
                    continue
                command = [sys.executable, __file__, "--data", data, "--folder", folder]
                command += ["--build", tokenizer, "--workers", workers, "--cache", cache]
                done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(done.stderr)
                seconds[workers] = json.loads(done.stdout.splitlines()[-1])["seconds"]
        rows.append(
            {
                "store": name,
                "megabytes_per_second_1": size / 1e6 / seconds[1],
                "megabytes_per_second_2": size / 1e6 / seconds[2],
                "scaling": seconds[1] / seconds[2],
            }
        )
        print(shown(rows[-1]), file=sys.stderr)
    return rows


# --- batches


def bench_batches(folder: Path, steps: int = 200, seconds: float = 0.05) -> list[dict]:
    """Measure how long a loop of steps of 50 ms waits for its batches."""
    import jax

    from lm.config import default
    from lm.data.batches import prefetch
    from lm.data.dataset import open_dataset
    from lm.experiment import build as build_experiment

    kinds = {
        "causal, isolated documents": {},
        "causal, one document": {"data.isolate_documents": False},
        "masked": {"objective.name": "masked", "model.family": "encoder"},
        "span corruption": {"objective.name": "span_corruption", "model.family": "encoder_decoder"},
    }
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for name, changes in kinds.items():
            config = default()
            config.data.source = f"jsonl:{sorted(folder.glob('*.jsonl'))[0]}"
            config.data.cache_directory, config.data.tokenizer = cache, "byte"
            config.data.validation_fraction = 0.0
            config.data.sequence_length, config.data.batch_size = 1024, 32
            config.model.n_layers, config.model.d_model, config.model.n_heads = 1, 16, 2
            config.model.vocab_size = 512
            for key, value in changes.items():
                section, field = key.split(".")
                config[section][field] = value
            dataset = open_dataset(config.data)
            experiment = build_experiment(config, jax.devices()[:1], dataset.tokenizer)
            batches = experiment.train_batches(dataset)
            alone = []
            for step in range(20):
                start = time.perf_counter()
                batches.rows(step, range(config.data.batch_size))
                alone.append(time.perf_counter() - start)
            waits = []
            arrays = prefetch(batches, ([s] for s in range(steps)), experiment.batch_sharding)
            with contextlib.closing(arrays):
                for _ in range(steps):
                    start = time.perf_counter()
                    batch = next(arrays)
                    waits.append(time.perf_counter() - start)
                    jax.block_until_ready(batch)
                    time.sleep(seconds)
            rows.append(
                {
                    "batches": name,
                    "milliseconds": 1e3 * statistics.median(alone),
                    "wait_percent_of_50ms": 100 * statistics.mean(waits[3:]) / seconds,
                    "median_percent": 100 * statistics.median(waits[3:]) / seconds,
                }
            )
            print(shown(rows[-1]), file=sys.stderr)
    return rows


def shown(row: dict) -> str:
    """Format a row as one line."""
    return ", ".join(f"{k} {v:,.4g}" if isinstance(v, float) else str(v) for k, v in row.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("LM_DATA_DIR"))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "bench_data"))
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--sample", type=int, default=24, help="megabytes of `encode`")
    parts = ["batches", "store", "encode"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--build", help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.data or not (Path(args.data) / "gpt2_bpe").is_dir():
        parser.error("--data (or LM_DATA_DIR) is a folder with gpt2_bpe/ and sentencepiece/")
    data = Path(args.data).absolute()
    if args.build:
        build(args.folder, data, args.build, args.workers, args.cache)
        return
    folder = make_corpus(args.folder, args.megabytes)
    report = {}
    for part in parts:  # `encode` is last, because it binds this process to a core
        if part in args.only:
            report[part] = {
                "batches": lambda: bench_batches(folder),
                "store": lambda: bench_store(folder, data),
                "encode": lambda: bench_encode(folder, data, args.sample),
            }[part]()
    if args.json:
        print(json.dumps(report))
        return
    for rows in report.values():
        for row in rows:
            print(shown(row))


if __name__ == "__main__":
    main()
