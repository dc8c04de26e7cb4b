"""Text classifiers trained as runs of this project, for corpora, safety sets and guards.

A toxicity or quality filter is trained by `lm train` on labeled texts and given by its workdir.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax
import numpy as np

from lm.config.registry import listed
from lm.data.batches import Batches, all_in_order, prefetch
from lm.data.record_store import Record
from lm.data.tokenizer import Tokenizer
from lm.errors import UserError, nearest
from lm.experiment import Experiment
from lm.models.variables import Params
from lm.runs.checkpoints import ignore_line
from lm.runs.saved_params import load_tokenizer, restore_run
from lm.runs.workdir import checkpoint_steps, saved_metadata
from lm.storage import open_run_folder, read_json, storage_path


@dataclass(frozen=True, eq=False)
class TextClassifier:
    """Run with objective classification, applied to texts of any length.

    A long text is classified in windows of the model's length; the largest probability counts.
    """

    experiment: Experiment
    params: Params
    tokenizer: Tokenizer

    @property
    def labels(self) -> Sequence[str]:
        """Classes in the order of the outputs."""
        return self.experiment.objective.labels  # type: ignore[attr-defined]

    @property
    def multi_label(self) -> bool:
        """True if each class has a probability of its own."""
        return self.experiment.objective.multi_label  # type: ignore[attr-defined]

    @property
    def window(self) -> int:
        """Maximum number of text tokens per window."""
        return self.experiment.objective.length - 2  # type: ignore[attr-defined]  # [CLS], [SEP]

    def largest(
        self, texts: Sequence[str], columns: Sequence[int], windows: int = 4
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the largest probability over the windows of each text.

        Args:
            texts: texts.
            columns: indices of C classes.
            windows: maximum number of windows per text, from its start.

        Returns:
            Probability of any of the classes, [N], and of each class, [N, C]; of independent
            labels, the largest one for any of them.
        """
        length = self.window
        tokens: list[np.ndarray] = []
        owners: list[int] = []
        for owner, text in enumerate(texts):
            ids = np.asarray(self.tokenizer.encode(text[: 32 * length * windows]))
            starts = range(0, max(1, min(len(ids), length * windows)), length)
            tokens += [ids[start : start + length] for start in starts]
            owners += [owner] * len(starts)
        each = self.probabilities(tokens)[:, list(columns)]
        together, by_class = np.zeros(len(texts)), np.zeros((len(texts), len(columns)))
        any_of = each.max(-1) if self.multi_label else each.sum(-1)
        np.maximum.at(together, owners, any_of)
        np.maximum.at(by_class, owners, each)
        return together, by_class

    def probabilities(self, tokens: Sequence[np.ndarray]) -> np.ndarray:
        """Return class probabilities [N, C] of token windows."""
        experiment = self.experiment
        records = [Record({"label": self.labels[0]}, {"text": ids}, None, None) for ids in tokens]
        batch_size = experiment.config.eval.batch_size
        batches = Batches(all_in_order([records]), experiment.objective.features, batch_size, 0)
        dispatches = [range(i, i + 1) for i in range(len(batches))]
        with closing(prefetch(batches, dispatches, experiment.batch_sharding)) as arrays:
            found = [
                jax.device_get(experiment.predict_steps(self.params, batch))[0] for batch in arrays
            ]
        scores = np.concatenate(found)[: len(tokens), : len(self.labels)]
        if self.multi_label:
            return 1 / (1 + np.exp(-scores))
        exponents = np.exp(scores - scores.max(-1, keepdims=True))
        return exponents / exponents.sum(-1, keepdims=True)


def class_columns(workdir: str, names: Sequence[str], purpose: str) -> list[int]:
    """Return the output indices of some classes of a classifier.

    Args:
        workdir: folder of the run.
        names: class names.
        purpose: purpose of the classes for the error message, as in "to remove".

    Raises:
        UserError: the run does not exist or is not a classifier, or a class is unknown.
    """
    labels = classes(workdir)
    if not names:
        raise UserError(f"name the classes {purpose}: {', '.join(labels)}")
    for name in names:
        if name not in labels:
            raise UserError(f"{workdir} has no class {name!r}{nearest(name, labels)}")
    return [labels.index(name) for name in names]


def classes(workdir: str) -> list[str]:
    """Return the classes of a run in output order; UserError if it has none."""
    try:
        config = read_json(Path(workdir) / "run.json")["config"]
        objective, labels = config["objective"]["name"], listed(config["data"]["labels"])
    except (FileNotFoundError, KeyError, TypeError) as error:
        raise UserError(f"no run in {workdir}") from error
    if objective != "classification" or not labels:
        raise UserError(f"{workdir}: its objective is {objective}, not classification with labels")
    return labels


def weights_digest(workdir: str) -> str:
    """Return the weights digest of a classifier's newest checkpoint."""
    classes(workdir)
    return run_weights_digest(workdir)


def run_weights_digest(workdir: str) -> str:
    """Return the weights digest of a run's newest checkpoint."""
    folder = open_run_folder(workdir)
    step = max(checkpoint_steps(folder), default=-1)
    metadata = saved_metadata(storage_path(folder / "checkpoints") / str(step)) or {}
    if "checksums" not in metadata:
        raise UserError(f"no readable checkpoint in {workdir}")
    known = [metadata[name] for name in ("checksums", "config", "fingerprint")]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


@cache
def load_classifier(workdir: str, digest: str, batch_size: int = 32) -> TextClassifier:
    """Load a classifier on all devices; results are cached.

    Args:
        workdir: folder of the run.
        digest: expected `weights_digest`.
        batch_size: minimum number of windows per batch.

    Raises:
        UserError: the run does not exist, or has other weights by now.
    """
    n = -(-max(batch_size, 1) // jax.device_count()) * jax.device_count()
    overrides = {"eval.batch_size": str(n)}
    folder = open_run_folder(workdir)
    experiment, params, _ = restore_run(folder, overrides, ignore_line, any_batch=True)
    if weights_digest(workdir) != digest:
        raise UserError(f"{workdir} has been trained further since it was loaded: use a copy")
    return TextClassifier(experiment, params, load_tokenizer(folder))
