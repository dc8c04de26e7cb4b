"""Make the files of the dialogue experiment (`scripts/reproduce.sh dialogue`).

    python scripts/dialogue_data.py excerpts OUT.jsonl
    python scripts/dialogue_data.py prompts ROWS.jsonl.gz N SEED OUT.jsonl [--without ROWS.jsonl.gz]
    python scripts/dialogue_data.py pairs ROWS.jsonl REPLIES.jsonl OUT.jsonl [--matched OUT.jsonl]
    python scripts/dialogue_data.py bits SCORES.jsonl

`excerpts` writes texts of the held-out files of the standard library for `lm score`, to measure
what fine-tuning forgets. `prompts` draws random rows, each prompt once. `pairs` writes preference
pairs, in which the reference is chosen and a model's reply rejected; it leaves out pairs that are
equal except for white space, and blank replies. `--matched` also writes the pairs whose lengths in
characters differ by at most a tenth or by one. `bits` computes the bits per byte of scored texts.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
from pathlib import Path

from lm.config import default
from lm.data.text.stdlib_corpus import StandardLibrary

EXCERPTS, CHARACTERS = 1000, 250


def excerpts(args: argparse.Namespace) -> None:
    """Write excerpts of each held-out file in turn, until there are enough."""
    source = StandardLibrary("", default().data, "validation")
    parts = []
    for _, text in source._documents():
        lines, size = [], 0
        for line in text.splitlines(keepends=True):
            lines.append(line)
            size += len(line)
            if size >= CHARACTERS:
                parts.append("".join(lines))
                lines, size = [], 0
    chosen = random.Random(0).sample(parts, min(EXCERPTS, len(parts)))
    write(args.out, [{"continuations": [text]} for text in chosen])


def prompts(args: argparse.Namespace) -> None:
    """Write rows of different prompts that are not in another file."""
    seen = {row["prompt"] for row in read(args.without)} if args.without else set()
    rows = {row["prompt"]: row for row in read(args.rows) if row["prompt"] not in seen}
    chosen = random.Random(args.seed).sample(list(rows.values()), min(args.n, len(rows)))
    write(args.out, chosen)


def pairs(args: argparse.Namespace) -> None:
    """Write the pairs of differing references and replies."""
    rows, replies = read(args.rows), read(args.replies)
    made = []
    for row, reply in zip(rows, replies, strict=True):
        chosen, rejected = row["completion"].strip(), reply["text"].strip()
        if rejected and chosen.split() != rejected.split():
            made.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    write(args.out, made)
    print(f"{len(made)} pairs of {len(rows)} prompts")
    if args.matched:
        matched = [pair for pair in made if alike(len(pair["chosen"]), len(pair["rejected"]))]
        write(args.matched, matched)
        print(f"{len(matched)} of them of like lengths")


def bits(args: argparse.Namespace) -> None:
    """Print the bits per byte of the texts scored by `lm score`."""
    texts = [text for row in read(args.scores) for text in row["continuations"]]
    nats = -sum(text["log_likelihood"] for text in texts)
    n_bytes = sum(len(text["text"].encode()) for text in texts)
    print(f"{args.scores}: {nats / math.log(2) / n_bytes:.4f} bits per byte")


def alike(a: int, b: int) -> bool:
    """Return whether lengths differ by at most a tenth of the larger, at least one."""
    return abs(a - b) <= max(1, max(a, b) // 10)


def read(path: str) -> list[dict]:
    """Return the rows of a file of JSON lines, perhaps compressed."""
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write(path: str, rows: list[dict]) -> None:
    """Write rows as JSON lines."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    for run, words in (
        (excerpts, ("out",)),
        (prompts, ("rows", "n", "seed", "out", "--without")),
        (pairs, ("rows", "replies", "out", "--matched")),
        (bits, ("scores",)),
    ):
        command = commands.add_parser(run.__name__)
        command.set_defaults(run=run)
        for word in words:
            command.add_argument(word, type=int if word in ("n", "seed") else str)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
