"""Counts and examples of what every rule kept, changed and removed."""

from __future__ import annotations

import bisect
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.io import get_datafolder
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.hashes.sha1 import sha1_hash64

from lm.tools.corpus.text_blocks import PersonalData

EXCERPT, MARGIN = 300, 100  # characters of an example, and of context around it
MOST_VALUES = 1000  # values of a column that are counted separately
OTHERS = "(others)"
MOST_REASONS = 10  # reasons per rule with examples in the card
NOTED = ("language", "language_score", "contaminated_ngram", "score")  # shown with an example
CLUSTER, NO_CLUSTER = "minhash_cluster_id", -1  # metadata of datatrove's near-duplicate filter
# Statistics that datatrove's blocks count for all documents; the others are rule-specific.
_COMMON = ("total", "forwarded", "dropped", "doc_len", "documents", "input_files", "batches")

Figures = dict[str, Any]


class Tally:
    """Document counts of a task at one rule; acts as datatrove's exclusion writer.

    Examples for each reason are those with the smallest hash of their names, so that they do not
    depend on the tasks. A near duplicate and the document kept for it share a hash.
    """

    def __init__(self, label: str, columns: Iterable[str], n_examples: int):
        """Create the counts.

        Args:
            label: name of the rule; default reason if its block gives none.
            columns: metadata columns whose values are counted.
            n_examples: examples per reason, and of kept and changed documents.
        """
        self.label, self.columns, self.n_examples = label, tuple(columns), n_examples
        self.counts: Counter[str] = Counter()
        self.reasons: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.values: dict[str, dict[str, Counter[str]]] = {name: {} for name in self.columns}
        self.lengths: Counter[int] = Counter()
        self.examples: defaultdict[str, list[tuple[int, str, Figures]]] = defaultdict(list)
        self._before: dict[int, str] = {}

    def incoming(self, documents: DocumentsPipeline) -> Iterator[Document]:
        """Yield documents to the block, remembering their texts."""
        for document in documents or ():
            self._before[id(document)] = document.text
            yield document

    def __enter__(self) -> Tally:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def write(self, document: Document, rank: int = 0) -> None:
        """Count a document that the block removes."""
        self.remove(document, document.metadata.pop("filter_reason", self.label))

    def remove(self, document: Document, reason: str) -> None:
        """Count a removed document."""
        text = self._before.pop(id(document), document.text)
        self._count("removed", document, text)
        self.reasons[reason].update(documents=1, characters=len(text))
        self._add_example(reason, document, text)

    def keep(self, document: Document) -> None:
        """Count a kept document."""
        before = self._before.pop(id(document), document.text)
        text = document.text
        self._count("kept", document, text)
        self.lengths[len(text).bit_length()] += 1
        if text == before:
            self._add_example("kept", document, text)
            return
        self.counts.update(changed=1, characters_cut=len(before) - len(text))
        at = next((i for i, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), 0)
        self._add_example("changed", document, text, max(0, at - EXCERPT // 3))

    def _count(self, side: str, document: Document, text: str) -> None:
        self.counts.update({side: 1, f"characters_{side}": len(text)})
        for name, values in self.values.items():
            value = str(document.metadata.get(name, ""))
            if value not in values and len(values) >= MOST_VALUES:
                value = OTHERS
            values.setdefault(value, Counter())[side] += 1

    def _add_example(self, kind: str, document: Document, text: str, start: int = 0) -> None:
        cluster = document.metadata.pop(CLUSTER, None)
        if cluster == NO_CLUSTER and kind == "kept":
            return
        found = self.examples[kind]
        key = sha1_hash64(document.id if cluster is None else str(cluster))
        if found and len(found) >= self.n_examples and key >= found[-1][0]:
            return
        noted = {name: document.metadata[name] for name in NOTED if name in document.metadata}
        if cluster is not None:
            noted["cluster"] = cluster
        window = text[max(0, start - MARGIN) : start + EXCERPT + MARGIN]
        example = {"id": document.id, "text": window, "start": start, **noted}
        bisect.insort(found, (key, document.id, example), key=lambda entry: entry[:2])
        del found[self.n_examples :]

    def figures(self, block: PipelineStep) -> Figures:
        """Return all counts, and examples without personal data."""
        details = {
            name: value.total
            for name, value in block.stats.stats.items()
            if name not in _COMMON and not name.startswith(("dropped_", "XXXXX"))
        }
        examples = {
            kind: [[key, name, _without_personal_data(example)] for key, name, example in found]
            for kind, found in self.examples.items()
        }
        return {
            "label": self.label,
            "counts": self.counts,
            "reasons": self.reasons,
            "values": self.values,
            "lengths": {str(bits): n for bits, n in self.lengths.items()},
            "details": details,
            "examples": examples,
        }


def _without_personal_data(example: Figures) -> Figures:
    """Mask personal data in an example's excerpt; the margins keep matches at its edges whole."""
    text = PersonalData().format(example["text"])
    before = min(MARGIN, example["start"])
    return example | {"text": text[before : before + EXCERPT]}


class Observed(PipelineStep):
    """Block with a tally of what it does, written to FOLDER/TASK.json.

    A document whose text a block empties is removed: a reader would skip it, and the numbering of
    documents would no longer match their signatures.
    """

    type = "🔎"

    def __init__(
        self,
        block: PipelineStep,
        label: str,
        folder: str,
        columns: Iterable[str],
        n_examples: int,
    ):
        """Wrap a block.

        Args:
            block: datatrove reader, filter, formatter or writer.
            label: name of the rule.
            folder: output folder of the tally.
            columns: metadata columns whose values are counted.
            n_examples: examples per reason.
        """
        self.block, self.label, self.folder = block, label, get_datafolder(folder)
        self.columns, self.n_examples = tuple(columns), n_examples
        super().__init__()

    def __repr__(self) -> str:
        return f"{self.label}: {self.block!r}"

    def run(
        self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1
    ) -> DocumentsPipeline:
        tally = Tally(self.label, self.columns, self.n_examples)
        if hasattr(self.block, "exclusion_writer"):
            self.block.exclusion_writer = tally
        incoming = None if data is None else tally.incoming(data)
        for document in self.block.run(incoming, rank, world_size):
            if document.text.strip():
                tally.keep(document)
                yield document
            else:
                tally.remove(document, "empty")
        with self.folder.open(f"{rank:05d}.json", "w") as file:
            json.dump(tally.figures(self.block), file)


def merge_figures(folder: str, label: str, n_examples: int) -> Figures:
    """Merge the tallies of all tasks, including their examples."""
    files = get_datafolder(folder)
    counts: Counter[str] = Counter()
    lengths: Counter[int] = Counter()
    details: Counter[str] = Counter()
    reasons: defaultdict[str, Counter[str]] = defaultdict(Counter)
    values: defaultdict[str, defaultdict[str, Counter[str]]] = defaultdict(
        lambda: defaultdict(Counter)
    )
    examples: defaultdict[str, list[Any]] = defaultdict(list)
    for name in files.list_files(glob_pattern="*.json"):
        with files.open(name, "r") as file:
            found = json.load(file)
        counts.update(found["counts"])
        details.update(found["details"])
        lengths.update({int(bits): n for bits, n in found["lengths"].items()})
        for reason, numbers in found["reasons"].items():
            reasons[reason].update(numbers)
        for column, by_value in found["values"].items():
            for value, numbers in by_value.items():
                values[column][value].update(numbers)
        for kind, some in found["examples"].items():
            examples[kind] += some
    by_number = sorted(reasons, key=lambda reason: (-reasons[reason]["documents"], reason))
    shown = ("kept", "changed", *by_number[:MOST_REASONS])
    return {
        "label": label,
        "counts": dict(sorted(counts.items())),
        "reasons": {reason: dict(reasons[reason]) for reason in by_number},
        "values": {
            column: {v: dict(sorted(n.items())) for v, n in sorted(by_value.items())}
            for column, by_value in values.items()
        },
        "lengths": dict(sorted(lengths.items())),
        "details": dict(sorted(details.items())),
        "examples": {
            kind: [e for _, _, e in sorted(examples[kind], key=lambda e: e[:2])[:n_examples]]
            for kind in shown
            if examples[kind]
        },
    }
