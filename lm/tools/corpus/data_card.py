"""Data card of a corpus: card.json, and a self-contained page.

The card depends only on the configuration and the documents, so that its digest identifies a
corpus: `lm train` records it in run.json for runs that read these shards.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datatrove.data import DocumentsPipeline
from datatrove.io import get_datafolder
from datatrove.pipeline.base import PipelineStep

from lm.data.row_documents import CARD_KIND
from lm.errors import UserError
from lm.tools.corpus.corpus_config import Config
from lm.tools.corpus.corpus_sources import SOURCE_NAME
from lm.tools.corpus.corpus_stages import READ, WRITTEN, tally_folder
from lm.tools.corpus.rule_tally import Figures, merge_figures
from lm.tools.html_pages import page_template

CARD, PAGE = "card.json", "index.html"
TEMPLATE = Path(__file__).with_name("data_card.html")
PACKAGES = ("datatrove", "phonenumbers", "py3langid")  # their versions affect what rules do


class CardMaker(PipelineStep):
    """Last step of a corpus: write the card, or raise UserError if no documents are left."""

    type, name = "📇", "data card"

    def __init__(self, config: Config, digests: Mapping[str, str], output: str):
        """Create the step.

        Args:
            config: configuration of the corpus.
            digests: digests of sources, test sets and rule files, by name.
            output: folder of the corpus.
        """
        super().__init__()
        self.config, self.digests, self.output = config, dict(digests), output

    def run(
        self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1
    ) -> DocumentsPipeline:
        card = self.card()
        folder = get_datafolder(self.output)
        texts = {PAGE: render_page(card), CARD: json.dumps(card, indent=1, ensure_ascii=False)}
        for name, text in texts.items():  # card last: it marks the corpus as complete
            with folder.open(f"{name}.part", "wb") as file:
                file.write(text.encode(errors="replace"))
            folder.mv(f"{name}.part", name)
        yield from ()

    def card(self) -> Figures:
        """Return the content of the card."""
        config, n_examples = self.config, self.config["card"]["examples"]
        labels = (READ, *config["rules"], WRITTEN)
        read, *rules, written = (
            merge_figures(tally_folder(self.output, label), label, n_examples) for label in labels
        )
        require_documents(read, config["sources"])
        if not written["counts"].get("kept"):
            removed = {rule["label"]: rule["counts"].get("removed", 0) for rule in rules}
            by = ", ".join(f"{label} {n:,}" for label, n in removed.items() if n)
            raise UserError(f"all {read['counts']['kept']:,} documents were removed: {by}")
        return {
            "kind": CARD_KIND,
            "title": config["card"]["title"],
            "read": read,
            "rules": rules,
            "written": written,
            "shards": list(self._shards()),
            "sources": {name: self._about(name, name) for name in config["sources"]},
            "tests": {name: self._about(f"test {name}", name) for name in config["tests"]},
            "rule_inputs": {
                name: self.digests[f"rule {name}"]
                for name in config["rules"]
                if f"rule {name}" in self.digests
            },
            "config": {name: values for name, values in config.items() if name != "cluster"},
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        }

    def _about(self, key: str, name: str) -> dict[str, str]:
        section = "tests" if key != name else "sources"
        values = self.config[section][name]
        about = {"source": values["source"], "digest": self.digests[key]}
        return about | ({"license": values["license"]} if values["license"] else {})

    def _shards(self) -> Iterator[dict[str, Any]]:
        folder = get_datafolder(self.output)
        suffix = f".{self.config['write']['format']}"
        for name in folder.list_files(recursive=False):
            if name.endswith(suffix):
                yield {"name": name, "bytes": folder.size(name), "sha256": _sha256(folder, name)}


def require_documents(read: Figures, sources: Any) -> None:
    """Raise UserError if a source gave no documents."""
    found = read["values"].get(SOURCE_NAME, {})  # {} if nothing was read
    for name in sources:
        if not found.get(name):
            raise UserError(f"config.sources.{name} contains no text")


def _sha256(folder: Any, name: str) -> str:
    with folder.open(name, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- page


def render_page(card: Figures) -> str:
    """Render the card as a page without scripts or external resources."""
    return page_template(TEMPLATE).render(
        card=card,
        title=card["title"] or "Data card",
        rules=[_about_rule(rule) for rule in card["rules"]],
        lengths=_histogram(card["read"]["lengths"], card["written"]["lengths"]),
        columns=_columns(card),
        config=list(_flat(card["config"])),
    )


def _about_rule(rule: Figures) -> Figures:
    counts = rule["counts"]
    removed, kept = counts.get("removed", 0), counts.get("kept", 0)
    examples = dict(rule["examples"])
    sides = [(kind, examples.pop(kind, [])) for kind in ("changed", "kept")]
    return {
        "label": rule["label"],
        "n": removed + kept,
        "removed": removed,
        "share": removed / max(1, removed + kept),
        "changed": counts.get("changed", 0),
        "cut": counts.get("characters_removed", 0) + counts.get("characters_cut", 0),
        "reasons": rule["reasons"],
        "details": rule["details"],
        "examples": [(f"removed: {kind}", some) for kind, some in examples.items()]
        + [side for side in sides if side[1]],
    }


def _histogram(read: dict[int, int], written: dict[int, int]) -> list[dict[str, Any]]:
    """Return a histogram of document lengths by powers of two, with heights from 0 to 1."""
    bits = range(min(read), max(read) + 1) if read else range(0)
    highest = max([*read.values(), 1])
    return [
        {
            "from": _short(2 ** (n - 1)) if n else "0",
            "read": read.get(n, 0),
            "written": written.get(n, 0),
            "height": read.get(n, 0) / highest,
            "height_written": written.get(n, 0) / highest,
        }
        for n in bits
    ]


def _short(n: int) -> str:
    """Format a power of two, as 512, 64K or 2M."""
    for unit, size in (("G", 2**30), ("M", 2**20), ("K", 2**10)):
        if n >= size:
            return f"{n // size}{unit}"
    return str(n)


def _columns(card: Figures) -> dict[str, list[tuple[str, int, int]]]:
    """Return (value, documents read, documents written) for each metadata column."""
    found = {}
    for name in card["config"]["card"]["columns"]:
        tallies = [card["read"], *card["rules"]]
        seen = next((t for t in tallies if _has_values(t, name)), card["read"])
        before, after = (tally["values"].get(name, {}) for tally in (seen, card["written"]))
        rows = [
            (value or "(none)", sum(numbers.values()), after.get(value, {}).get("kept", 0))
            for value, numbers in before.items()
        ]
        if any(value != "(none)" for value, _, _ in rows):
            found[name] = sorted(rows, key=lambda row: (-row[1], row[0]))
    return found


def _has_values(tally: Figures, column: str) -> bool:
    return any(value for value in tally["values"].get(column, {}))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)
