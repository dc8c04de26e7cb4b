"""Human evaluation: samples of two runs side by side on a blind page, and the win rate of answers.

The page does not reveal which run wrote what: that is in key.json next to it, which the annotator
does not need.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from lm.errors import UserError
from lm.storage import read_json, write_atomically
from lm.tools.html_pages import page_template

TEMPLATE = Path(__file__).with_name("compare_page.html")
KEY = "key.json"
_CONFIDENCE = 0.95


def write_compare_page(
    folder: Path,
    runs: Sequence[str],
    prompts: Sequence[str],
    texts: tuple[Sequence[str], Sequence[str]],
    seed: int,
) -> Path:
    """Write index.html and key.json to a folder; return the path of the page.

    Args:
        folder: existing folder.
        runs: names of the two runs, for key.json.
        prompts: prompts, or sources.
        texts: text of each run for each prompt.
        seed: seed of the random order of the two texts.

    Raises:
        UserError: the extra "report" is not installed.
    """
    coin = random.Random(seed)
    first = [coin.randrange(2) for _ in prompts]
    pairs = [
        {"prompt": prompt, "left": both[run], "right": both[1 - run]}
        for prompt, both, run in zip(prompts, zip(*texts, strict=True), first, strict=True)
    ]
    page = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]
    text = page_template(TEMPLATE).render(
        title="Which text is better?", tiles={}, data={"page": page, "pairs": pairs}
    )
    key = {"page": page, "runs": list(runs), "first": first}
    write_atomically(folder / KEY, json.dumps(key, indent=1) + "\n")
    (folder / "index.html").write_bytes(text.encode(errors="replace"))
    return folder / "index.html"


def win_rate(folder: Path, files: Sequence[Path]) -> dict[str, Any]:
    """Return how often the first run was preferred in the answers to a page.

    Args:
        folder: folder of the page.
        files: answers, one file per person.

    Returns:
        Counts "answers", "wins" and "losses" of the first run, and "ties"; excluding ties, the
        percentage of wins ("win_rate") with its 95 % interval of Wilson (1927) ("low", "high"), and
        of choices of the left text ("left"), which is near 50 if the order had no influence. All
        answers count as independent, even several for one pair.

    Raises:
        UserError: a file cannot be read, or has no answers to this page.
    """
    key = _read_key(folder / KEY)
    choices = [pair for file in files for pair in _choices(file, key)]
    decided = [(choice, first) for choice, first in choices if choice]
    wins = sum((choice == 1) == (first == 0) for choice, first in decided)
    found: dict[str, Any] = {
        "run": key["runs"][0],
        "other": key["runs"][1],
        "answers": len(choices),
        "wins": wins,
        "losses": len(decided) - wins,
        "ties": len(choices) - len(decided),
    }
    if decided:
        interval = stats.binomtest(wins, len(decided)).proportion_ci(_CONFIDENCE, "wilson")
        left = sum(choice == 1 for choice, _ in decided)
        shares = {"win_rate": wins / len(decided), "low": interval.low, "high": interval.high}
        shares["left"] = left / len(decided)
        found |= {name: 100 * float(share) for name, share in shares.items()}
    return found


def _read_key(file: Path) -> dict[str, Any]:
    """Read the key that `write_compare_page` wrote next to the page."""
    key = _read(file, "not a page of lm compare")
    runs, first = key.get("runs"), key.get("first")
    has_lists = isinstance(runs, list) and len(runs) == 2 and isinstance(first, list)
    if not has_lists or {*map(repr, key["first"])} - {"0", "1"}:
        raise UserError(f"{file} is damaged: it does not distinguish two runs")
    return key


def _choices(file: Path, key: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return the choices that a person made, each with the run whose text came first."""
    answers = _read(file, "no answers")
    if answers.get("page") != key.get("page"):
        raise UserError(f"{file}: contains no answers to the page of this {KEY}")
    choices, first = answers.get("choices"), key["first"]
    if not isinstance(choices, list) or len(choices) != len(first):
        raise UserError(f"{file}: 'choices' are not {len(first)}, one per pair")
    for choice in choices:
        if choice is not None and (type(choice) is not int or choice not in (0, 1, 2)):
            raise UserError(
                f"{file}: a choice must be 1, 2, 0 or null, not {json.dumps(choice)[:40]}"
            )
    return [(x, run) for x, run in zip(choices, first, strict=True) if x is not None]


def _read(file: Path, what: str) -> dict[str, Any]:
    """Return the object in a JSON file."""
    try:
        return read_json(file)
    except FileNotFoundError:
        raise UserError(f"{what}: file {file} does not exist") from None
