"""Write experiments/PAPERS.md: size, cost and expected result of every published model.

    lm params --all --json | python scripts/papers.py > experiments/PAPERS.md

Sizes and costs are computed from the configurations. The paper's number and the expected
result come from the table in the docstring of each experiment file.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lm.tools.formatting import short

HEADER = """# Published models

Every variant that reproduces a published model. The docstring of the experiment file explains the
expected result and what differs from the paper. Written by `lm params --all --json | python
scripts/papers.py`.

Parameters are counted in the model that lm builds; "without embeddings" leaves out the embeddings
of tokens, positions and token types and an untied output layer. Tokens are those of a whole run,
source and target together. FLOPs are 6 N D, where D counts tokens and N the parameters without
embeddings that a token passes through (the experts that it uses; the encoder or the decoder).
They leave out the attention matmuls and the output layer. * Data and recipe are not published.

"""
COLUMNS = (
    ("experiment", "---"),
    ("published as", "---"),
    ("parameters", "--:"),
    ("without embeddings", "--:"),
    ("paper's number", "--:"),
    ("tokens per step", "--:"),
    ("tokens", "--:"),
    ("FLOPs", "--:"),
    ("expected", "---"),
)


def record(file: Path) -> dict[str, dict[str, str]]:
    """Parse the table in a file's docstring: rows by variant, cells by column."""
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


def page(sizes: Iterable[Mapping[str, Any]]) -> str:
    """Return PAPERS.md for the output of `lm params --all --json`."""
    names, rules = zip(*COLUMNS, strict=True)
    rows = [names, rules]
    for size in sizes:
        file, _, variant = size["config"].rpartition(":")
        if not size["paper"]:
            continue
        said = record(Path(file))[variant]
        rows.append(
            (
                f"{Path(file).name}:{variant}",
                size["paper"],
                f"{size['total']:,}",
                f"{size['non_embedding']:,}",
                said["paper's"] or "-",
                f"{size['batch_tokens']:,}",
                short(size["tokens"]) + (" *" if "*" in said["tokens"] else ""),
                scientific(size["flops"]),
                said["expected"] or "-",
            )
        )
    return HEADER + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def scientific(n: float) -> str:
    """Format with two digits and a power of ten: 5.2e18."""
    return f"{n:.1e}".replace("e+", "e")


if __name__ == "__main__":
    print(page(json.load(sys.stdin)), end="")
