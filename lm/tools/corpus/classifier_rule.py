"""Rule that removes what a classifier finds, a run of this project.

A toxicity or quality filter is trained by `lm train` on labelled texts, and named by its workdir.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

from lm.config.registry import listed
from lm.errors import UserError, nearest
from lm.runs.workdir import checkpoint_steps, saved_metadata
from lm.storage import open_run_folder, read_json, storage_path


class Classifier(BaseFilter):
    """Remove documents of some classes, by a classifier on the CPU.

    A long document is read in windows of as many tokens as the classifier takes; the largest
    probability counts.
    """

    name = "🧮 classifier"

    def __init__(
        self,
        workdir: str,
        remove: Sequence[str],
        threshold: float = 0.5,
        batch_size: int = 32,
        windows: int = 4,
    ):
        """Create the filter.

        Args:
            workdir: folder of the run.
            remove: classes, of --config.data.labels, of the documents that are removed.
            threshold: largest probability of these classes together that is kept.
            batch_size: windows at a time.
            windows: most windows of a document that are read, from its start.

        Raises:
            UserError: there is no such run, it is no classifier, or a class is unknown.
        """
        if batch_size < 2 or windows < 1:
            raise UserError("batch_size is at least 2, and windows at least 1")
        super().__init__(batch_size=batch_size)
        labels = _labels(workdir)
        if not remove:
            raise UserError(f"name the classes to remove: {', '.join(labels)}")
        for label in remove:
            if label not in labels:
                raise UserError(f"{workdir} has no class {label!r}{nearest(label, labels)}")
        self.workdir, self.threshold, self.windows = workdir, threshold, windows
        self.digest = self.digest_of(workdir)
        self.remove = tuple(remove)
        self.columns = [labels.index(label) for label in remove]

    @staticmethod
    def digest_of(workdir: str, **options: object) -> str:
        """Return the digest of the weights, of the run's newest checkpoint."""
        _labels(workdir)
        folder = open_run_folder(workdir)
        step = max(checkpoint_steps(folder), default=-1)
        metadata = saved_metadata(storage_path(folder / "checkpoints") / str(step)) or {}
        if "checksums" not in metadata:
            raise UserError(f"no readable checkpoint in {workdir}")
        known = [metadata[name] for name in ("checksums", "config", "fingerprint")]
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        return self.filter_batch([doc])[0]

    def filter_batch(self, batch: list[Document]) -> list[bool | tuple[bool, str]]:
        run = _load(self.workdir, self.batch_size, self.digest)
        length = run.experiment.objective.length - 2  # [CLS] and [SEP]
        tokens, owners = [], []
        for owner, document in enumerate(batch):
            ids = run.encode(document.text[: 32 * length * self.windows])
            starts = range(0, max(1, min(len(ids), length * self.windows)), length)
            tokens += [ids[start : start + length] for start in starts]
            owners += [owner] * len(starts)
        each = _probabilities(run, tokens, self.batch_size)[:, self.columns]
        together, by_class = np.zeros(len(batch)), np.zeros((len(batch), len(self.remove)))
        np.maximum.at(together, owners, each.sum(-1))
        np.maximum.at(by_class, owners, each)
        for document, probability in zip(batch, together, strict=True):
            document.metadata["score"] = round(float(probability), 4)
        likeliest = (self.remove[column] for column in by_class.argmax(-1))
        return [
            bool(probability <= self.threshold) or (False, label)
            for probability, label in zip(together, likeliest, strict=True)
        ]


def _labels(workdir: str) -> list[str]:
    """Return the classes of a run, in the order of its outputs."""
    try:
        config = read_json(Path(workdir) / "run.json")["config"]
        objective, labels = config["objective"]["name"], listed(config["data"]["labels"])
    except (FileNotFoundError, KeyError, TypeError) as error:
        raise UserError(f"no run in {workdir}") from error
    if objective != "classification" or not labels:
        raise UserError(f"{workdir}: its objective is {objective}, not classification with labels")
    return labels


@cache
def _load(workdir: str, batch_size: int, digest: str) -> Any:
    import jax

    from lm.api import load_run

    jax.config.update("jax_platforms", "cpu")
    run = load_run(workdir, {"eval.batch_size": str(batch_size)})
    if Classifier.digest_of(workdir) != digest:
        raise UserError(f"{workdir} has been trained on since the corpus was begun: use a copy")
    return run


def _probabilities(run: Any, tokens: Sequence[np.ndarray], batch_size: int) -> np.ndarray:
    """Return the probabilities [N, C] of the classes of windows of tokens."""
    import jax

    from lm.data.batches import Batches, all_in_order, prefetch
    from lm.data.record_store import Record

    experiment = run.experiment
    label = experiment.objective.labels[0]
    records = [Record({"label": label}, {"text": ids}, None, None) for ids in tokens]
    batches = Batches(all_in_order([records]), experiment.objective.features, batch_size, 0)
    dispatches = [range(i, i + 1) for i in range(len(batches))]
    with closing(prefetch(batches, dispatches, experiment.batch_sharding)) as arrays:
        found = [jax.device_get(experiment.predict_steps(run.params, batch))[0] for batch in arrays]
    scores = np.concatenate(found)[: len(tokens), : len(experiment.objective.labels)]
    exponents = np.exp(scores - scores.max(-1, keepdims=True))
    return exponents / exponents.sum(-1, keepdims=True)
